"""States of bitsandbytes: moments in 8 bits by a table, and in 32 bits under other names."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from adamfn.interop.torch.layouts import Array
from adamfn.interop.torch.parameters import TorchParameter, array_of, number_of

_BLOCKS = (256, 2048, 64, 128, 512, 1024, 4096)
"""The sizes of blocks: that of today, that of before 0.44, others."""


def is_quantized(parameter: TorchParameter) -> bool:
    """Whether a group and a state are of bitsandbytes."""
    return "state1" in parameter.state or "t_beta3" in parameter.group


def with_plain_moments(caller: str, parameter: TorchParameter) -> TorchParameter:
    """The parameter with moments under torch's names, decoded where they are codes.

    Raises:
      ValueError: a table, a scale or a moment is missing, or does not fit; or the run's gradients
        or updates were clipped by what the state keeps.
    """
    state = parameter.state
    if "state1" not in state:
        return parameter
    for key, argument in (("gnorm_vec", "percentile_clipping"), ("unorm_vec", "max_unorm")):
        if key in state:
            raise ValueError(
                f"{caller}: the state of {parameter} has {key}, of bitsandbytes' {argument}, which"
                " no chain here does. Clip by optax, and leave the key out of the state."
            )
    moments = {
        name: _decoded(caller, parameter, state, number)
        for number, name in ((1, "exp_avg"), (2, "exp_avg_sq"))
    }
    return parameter._replace(state={"step": state.get("step"), **moments})


def _decoded(
    caller: str, parameter: TorchParameter, state: Mapping[str, Any], number: int
) -> Array:
    def entry(key: str) -> Array:
        if f"{key}{number}" not in state:
            raise ValueError(
                f"{caller}: the state of {parameter} has no {key}{number}; found"
                f" {', '.join(map(str, state))}. Pass the state_dict() of bitsandbytes' AdamW or"
                " AdamW8bit itself."
            )
        return array_of(caller, f"{key}{number} of {parameter}", state[f"{key}{number}"])

    codes = entry("state")
    if codes.dtype != np.uint8:
        return codes
    table, scales = entry("qmap"), entry("absmax" if f"absmax{number}" in state else "max")
    size = _block_size(caller, parameter, state, codes.size, scales.size)
    if table.shape != (256,):
        raise ValueError(
            f"{caller}: qmap{number} of {parameter} has the shape {table.shape}; expected (256,)."
        )
    values = table.astype(np.float32)[codes.reshape(-1)]
    return (values * np.repeat(scales.reshape(-1), size)[: codes.size]).reshape(codes.shape)


def _block_size(
    caller: str, parameter: TorchParameter, state: Mapping[str, Any], number: int, blocks: int
) -> int:
    given = state.get("blocksize")
    sizes = _BLOCKS if given is None else (int(number_of(caller, "blocksize", given)),)
    for size in (*sizes, *([number] if blocks == 1 and given is None else [])):
        if size > 0 and -(-number // size) == blocks:
            return size
    raise ValueError(
        f"{caller}: {parameter} has {blocks} scales for {number} elements; expected one for each"
        f" block of {' or '.join(map(str, sizes[:2]))}. Add the size of its blocks to its state,"
        " as blocksize."
    )
