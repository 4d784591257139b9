# SPDX-License-Identifier: Apache-2.0
"""The GPU that a program is lowered for, and what its compilers can do for it."""

import re
from typing import Any

import jax

_BY_NAME = {"V100": 7.0, "T4": 7.5, "H100": 9.0, "H200": 9.0, "B200": 10.0, "B300": 10.3}
"""Of some GPUs that are compiled for where they are not at hand, and of which JAX has the name."""


def capability(context: Any = None) -> float | None:
    """The CUDA compute capability of a device, such as 9.0; None if unknown, or for other makers.

    Args:
      context: the device; or the axis context of a lowering, of which a mesh has the device. If
        neither says it, the abstract mesh in use names the device, or else it is the one at hand.
    """
    devices = getattr(getattr(context, "mesh", None), "devices", None)
    device = context if devices is None else devices.flat[0]
    if not hasattr(device, "compute_capability"):
        named = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
        at_hand = {own.device_kind: own for own in _at_hand()}
        kind = getattr(named, "device_kind", None) or next(iter(at_hand), "")
        if kind not in at_hand:
            return next((found for name, found in _BY_NAME.items() if name in kind), None)
        device = at_hand[kind]
    known = re.fullmatch(r"\d+\.\d+", str(getattr(device, "compute_capability", "")))
    return float(known[0]) if known else None


def _at_hand() -> list[Any]:
    try:
        return jax.local_devices(backend="gpu")
    except RuntimeError:  # JAX has no such devices here
        return []
