"""States in and out: `adamfn.interop.torch`, `adamfn.interop.optax` and `adamfn.interop.orbax`.

No module imports the library that it is named after.
"""
