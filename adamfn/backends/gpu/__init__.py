"""The kernels on GPU."""
