"""Optimizer states in and out: `adamfn.interop.torch` and `adamfn.interop.optax`.

Neither module imports the library that it is named after.
"""
