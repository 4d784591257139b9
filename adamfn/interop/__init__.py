"""Optimizer states in and out: `adamfn.interop.torch` and `adamfn.interop.optax`; and
checkpoints: `adamfn.interop.orbax`.

No module imports the library that it is named after.
"""
