"""States of bitsandbytes: moments in 8 bits by a table, and in 32 bits under other names."""

import numpy as np

from adamfn.interop.torch.parameters import Array, TorchParameter, array_of, number_of

_BLOCKS = (256, 2048, 64, 128, 512, 1024, 4096)
"""Sizes of blocks: the present one, the one before 0.44, others."""


def is_quantized(parameter: TorchParameter) -> bool:
    """Whether a group and a state are of bitsandbytes."""
    return "state1" in parameter.state or "t_beta3" in parameter.group


def with_plain_moments(parameter: TorchParameter) -> TorchParameter:
    """The parameter with moments under torch's names, decoded if they are codes."""
    state = parameter.state
    if "state1" not in state:
        return parameter
    for key, argument in (("gnorm_vec", "percentile_clipping"), ("unorm_vec", "max_unorm")):
        if key in state:
            raise ValueError(
                f"interop.torch: the state of {parameter} has {key}, of bitsandbytes' {argument},"
                " which no chain here does. Clip by optax, and leave the key out of the state."
            )
    moments = {"exp_avg": _decoded(parameter, 1), "exp_avg_sq": _decoded(parameter, 2)}
    return parameter._replace(state={"step": state.get("step"), **moments})


def _decoded(parameter: TorchParameter, number: int) -> Array:
    state = parameter.state

    def entry(key: str) -> Array:
        if f"{key}{number}" not in state:
            raise ValueError(
                f"interop.torch: the state of {parameter} has no {key}{number}; found"
                f" {', '.join(map(str, state))}. Pass the state_dict() of bitsandbytes' AdamW or"
                " AdamW8bit itself."
            )
        return array_of(f"{key}{number} of {parameter}", state[f"{key}{number}"])

    codes = entry("state")
    if codes.dtype != np.uint8:
        return codes
    table, scales = entry("qmap"), entry("absmax" if f"absmax{number}" in state else "max")
    size = _block_size(parameter, codes.size, scales.size)
    if table.shape != (256,):
        raise ValueError(
            f"interop.torch: qmap{number} of {parameter} has the shape {table.shape}; expected"
            " (256,)."
        )
    values = table.astype(np.float32)[codes.reshape(-1)]
    return (values * np.repeat(scales.reshape(-1), size)[: codes.size]).reshape(codes.shape)


def _block_size(parameter: TorchParameter, elements: int, blocks: int) -> int:
    given = parameter.state.get("blocksize")
    sizes = _BLOCKS if given is None else (int(number_of("blocksize", given)),)
    for size in (*sizes, *([elements] if blocks == 1 and given is None else [])):
        if size > 0 and -(-elements // size) == blocks:
            return size
    raise ValueError(
        f"interop.torch: {parameter} has {blocks} scales for {elements} elements; expected one for"
        f" each block of {' or '.join(map(str, sizes[:2]))}. Add the size of its blocks to its"
        " state, as blocksize."
    )
