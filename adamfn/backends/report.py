# SPDX-License-Identifier: Apache-2.0
"""`backend`: what runs programs on this machine, and why."""

from typing import Any, NamedTuple

import jax

from adamfn.backends.cpu import loader
from adamfn.trees import shown


class Runner(NamedTuple):
    """What runs programs on a platform."""

    platform: str
    """`cpu`, `gpu` or `tpu`, as JAX calls it."""
    name: str
    """`native`, `kernels` or `xla`."""
    reason: str

    def __str__(self) -> str:
        """As a sentence."""
        return f"{self.name} on {self.platform}: {self.reason}"


def backend(platform: Any = None) -> Runner:
    """Says what runs `update` and `step` of a chain, and why.

    Args:
      platform: `"cpu"`, `"gpu"` or `"tpu"`, or a device, also of a topology to compile for; None
        for JAX's default. Of several GPUs, `"gpu"` means the one that an abstract mesh in use
        names, or the first at hand.

    Returns:
      A `Runner`; printed, it is a sentence.

    Raises:
      ValueError: JAX knows no such platform.

    >>> import adamfn
    >>> print(adamfn.backend("tpu"))
    kernels on tpu: moments in 8 and 4 bits in one kernel a leaf, by Mosaic; XLA fuses the rest.
    """
    device = platform if hasattr(platform, "device_kind") else None
    platform = (
        jax.default_backend() if platform is None else getattr(platform, "platform", platform)
    )
    known = dict.fromkeys(("cpu", "gpu", "cuda", "rocm", "tpu", jax.default_backend()))
    if platform not in known:
        raise ValueError(
            f"backend: platform is {shown(platform)}; expected one of {', '.join(known)}. It is the"
            " same for all transformations; adamfn.with_backend chooses one for a transformation."
        )
    if platform != "cpu":
        from adamfn.backends.kernels import kernels_on  # slow to import

        first = kernels_on("cuda" if platform == "gpu" else platform, context=device)[0].__name__
        if first.endswith("passes"):
            reason = "neither Triton nor Mosaic has kernels for this device and version of JAX."
            return Runner(platform, "xla", reason)
        compiler = "Triton" if first.endswith("triton") else "Mosaic"
        reason = f"moments in 8 and 4 bits in one kernel a leaf, by {compiler}; XLA fuses the rest."
        return Runner(platform, "kernels", reason)
    native = loader.native()
    if native.reason is not None:
        return Runner(platform, "xla", native.reason)
    reason = (
        f"compiled for {native.variant}; Adam, AdamW and Adam-atan2 on leaves of float32 and"
        " bfloat16 with moments in float32, bfloat16 or 8 bits, whole or inside shard_map, go"
        " through it, the rest through XLA."
    )
    return Runner(platform, "native", reason)
