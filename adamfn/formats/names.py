"""The formats that have a name."""

from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from adamfn.formats.base import Format
from adamfn.formats.bfloat16 import Rounded
from adamfn.formats.blockmean import BlockMean
from adamfn.formats.codec import is_codec
from adamfn.formats.eight_bit import EightBit
from adamfn.formats.factored import Factored
from adamfn.formats.float32 import Exact
from adamfn.formats.four_bit import FourBit
from adamfn.formats.linear import Linear
from adamfn.formats.pair import Pair

FORMATS: dict[str, Format] = {
    "float32": Pair(Exact(), Exact()),
    "bfloat16": Pair(Rounded(), Rounded()),
    "8bit": EightBit(),
    "4bit": FourBit(),
    "factored": Pair(Linear(), Factored()),
    "blockmean": Pair(Linear(), BlockMean()),
}
"""The formats that have a name."""

_NAMES = f"one of {', '.join(map(repr, FORMATS))}"


def name_of(moments: Any) -> Any:
    """The name of a format that is given as a dtype, or as None for float32; else what came."""
    if moments is None:
        return "float32"
    if isinstance(moments, type | np.dtype) and moments in (jnp.float32, jnp.bfloat16):
        return jnp.dtype(moments).name
    return moments


def get(name_or_format: Any) -> Format:
    """The format of a name, or a format as it came.

    Args:
      name_or_format: one of `FORMATS`, an object with `encode`, `decode` and `holds`, or what
        `name_of` knows.

    Raises:
      ValueError: no format has this name.
      TypeError: it is neither, or cannot be hashed.

    >>> get("8bit")
    EightBit(block=256)
    """
    name_or_format = name_of(name_or_format)
    if isinstance(name_or_format, str):
        if name_or_format not in FORMATS:
            raise ValueError(f"moments is {name_or_format!r}; expected {_NAMES}.")
        return FORMATS[name_or_format]
    methods = [getattr(name_or_format, name, None) for name in ("encode", "decode", "holds")]
    if isinstance(name_or_format, type) or not all(map(callable, methods)):
        raise TypeError(
            f"moments is {name_or_format!r}; expected {_NAMES}, an object with `encode`, `decode`"
            " and `holds`, or a function of a leaf's path and the leaf that returns one of these."
        )
    if is_codec(name_or_format):
        raise TypeError(
            f"moments is {name_or_format!r}, a codec of one moment; expected a format of both, such"
            f" as Pair(mu={name_or_format!r}, nu=Rounded())."
        )
    try:
        hash(name_or_format)
    except TypeError as error:
        raise TypeError(
            f"moments is {name_or_format!r}, which cannot be hashed; expected a format that can, as"
            " compiled updates are kept by it. @dataclass(frozen=True) makes it so."
        ) from error
    return cast("Format", name_or_format)
