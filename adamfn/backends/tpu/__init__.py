"""The kernel on TPU."""
