"""`backend`: what runs a fused step here, and why."""

from typing import NamedTuple

import jax

from adamfn.fused import native


class Backend(NamedTuple):
    """What runs a fused step on a platform."""

    platform: str
    """`cpu`, `gpu` or `tpu`, as JAX calls it."""
    name: str
    """`native` or `xla`."""
    reason: str

    def __str__(self) -> str:
        """In words."""
        return f"{self.name} on {self.platform}: {self.reason}"


def backend(platform: str | None = None) -> Backend:
    """What runs the step of `fused_adam` and `fused_adamw` with `backend="auto"`, and why.

    On CPU the first call builds the native code, if no step has done so before.

    Args:
      platform: `"cpu"`, `"gpu"` or `"tpu"`; None for JAX's default.

    Returns:
      A `Backend`; printed, it is a sentence.

    Raises:
      ValueError: JAX knows no such platform.

    >>> import adamfn
    >>> print(adamfn.fused.backend("tpu"))
    xla on tpu: XLA fuses the step of a leaf into one kernel there.
    """
    platform = jax.default_backend() if platform is None else platform
    known = ("cpu", "gpu", "cuda", "rocm", "tpu", jax.default_backend())
    if platform not in known:
        raise ValueError(f"backend: platform is {platform!r}; expected one of {', '.join(known)}.")
    if platform != "cpu":
        reason = "XLA fuses the step of a leaf into one kernel there."
        return Backend(platform, "xla", reason)
    missing = native.load()
    if missing is None:
        cache = native.cache_directory()
        kept = "for this process alone" if cache is None else f"kept in {cache}"
        reason = (
            f"built by {native.find_compiler()}, {kept}; leaves of float32 and bfloat16 with"
            " moments in float32, bfloat16 or 8 bits, whole or inside shard_map, go through it,"
            " others through XLA."
        )
        return Backend(platform, "native", reason)
    return Backend(platform, "xla", missing)
