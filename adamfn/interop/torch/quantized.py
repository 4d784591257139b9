"""States of bitsandbytes: moments in 8 bits by a table, and in 32 bits under other names."""

import numpy as np

from adamfn.interop.torch.parameters import Array, TorchParameter, array_of, number_of

_BLOCKS = (256, 2048, 64, 128, 512, 1024, 4096)
"""Sizes of blocks: the present one, the one before 0.44, others."""


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
    def entry(key: str) -> Array:
        return array_of(f"{key}{number} of {parameter}", parameter.entry("state", f"{key}{number}"))

    codes = entry("state")
    if codes.dtype != np.uint8:
        return codes
    table = entry("qmap")
    scales = entry("absmax" if f"absmax{number}" in parameter.state else "max").reshape(-1)
    given = parameter.state.get("blocksize")
    sizes = (*_BLOCKS, codes.size) if given is None else (int(number_of("blocksize", given)),)
    size = next((n for n in sizes if n > 0 and -(-codes.size // n) == scales.size), None)
    if size is None or table.shape != (256,):
        raise ValueError(
            f"interop.torch: {parameter} has {scales.size} scales and a table qmap{number} of the"
            f" shape {table.shape} for {codes.size} elements; expected a scale for each block of"
            f" {' or '.join(map(str, sizes[:2]))}, and the shape (256,). Add the size of its blocks"
            " to its state, as blocksize."
        )
    values = table.astype(np.float32)[codes.reshape(-1)]
    return (values * np.repeat(scales, size)[: codes.size]).reshape(codes.shape)
