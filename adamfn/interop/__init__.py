"""States in and out: `adamfn.interop.torch`, `adamfn.interop.optax` and `adamfn.interop.orbax`.

No module imports the library that it is named after, but for `adamfn.interop.flax`: its classes are
subclasses of flax's. It is imported by whoever wants it, and needs flax.
"""
