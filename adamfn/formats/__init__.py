# SPDX-License-Identifier: Apache-2.0
"""Formats: how Adam's two moments are stored between steps, and which one each leaf gets."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from adamfn.formats.arrangement import describe
from adamfn.formats.blocks import Blockwise
from adamfn.formats.codecs import Codec, Encoded, Exact, Linear, Pair, Rounded, kind_of
from adamfn.formats.format import BaseFormat, Format, Stored, answer, has_hash
from adamfn.formats.levels import EightBit, FourBit
from adamfn.formats.means import BlockMean, Factored
from adamfn.formats.noise import noise
from adamfn.trees import Numeric, PyTree, path_name, shown

__all__ = [
    "FORMATS", "BaseFormat", "BlockMean", "Blockwise", "Codec", "EightBit", "Encoded", "Exact",
    "Factored", "Format", "FourBit", "Linear", "Moments", "Pair", "Rounded", "Stored",
    "check_moments", "choose_formats", "describe", "get", "noise",
]  # fmt: skip

# With bytes a parameter of GPT-2 small, whose small leaves stay in float32.
FORMATS: dict[str, Format] = {
    "float32": Pair(Exact(), Exact()),  # 8
    "bfloat16": Pair(Rounded(), Rounded()),  # 4
    "8bit": EightBit(),  # 2.05
    "4bit": FourBit(),  # 1.10
    "factored": Pair(Linear(), Factored()),  # 1.03
    "blockmean": Pair(Linear(), BlockMean()),  # 1.03
}

Moments: TypeAlias = str | Format | DTypeLike | Callable[[str, Any], Any] | None
"""How moments are stored: a format's name, a format, `jnp.float32` or `jnp.bfloat16`, None for
float32, or a function that chooses one of these by each leaf's path, such as `layers/0/kernel`, and
shape. It is given the path and the parameter, or, where `update` got none, its gradient."""


def get(name_or_format: Any) -> Format:
    """The format with a name, `jnp.float32`, `jnp.bfloat16` or None; a format is returned as it is.

    Raises:
      TypeError, ValueError: no format has this name; it is no format, or cannot be hashed.

    >>> get("8bit")
    EightBit(block=256)
    """
    format = _name_of(name_or_format)
    if isinstance(format, str) and format in FORMATS:
        return FORMATS[format]
    found, names = f"moments is {shown(format)}", f"one of {', '.join(map(repr, FORMATS))}"
    if isinstance(format, str):
        raise ValueError(f"{found}; expected {names}.")
    if (kind := kind_of(format)) is None:
        raise TypeError(
            f"{found}; expected {names}, an object with `encode`, `decode` and `holds`, or a"
            " function of a leaf's path and the leaf that returns one of these."
        )
    if kind == "codec":
        raise TypeError(
            f"{found}, a codec of one moment; expected a format of both, such as"
            f" Pair(mu={shown(format)}, nu=Rounded())."
        )
    if not has_hash(format):
        raise TypeError(
            f"{found}, which cannot be hashed; expected a format that can, as compiled updates are"
            " cached by it. @dataclass(frozen=True) makes it so."
        )
    return cast("Format", format)


def check_moments(moments: Any, b1: Numeric = 0.0, name: str = "b1") -> Moments:
    """Returns `moments`, with a dtype or None as a name; a function as one that checks its results.

    Raises as `get`, and ValueError for a format that does not bear the decay of mu, if that is a
    number; `name` is what the message calls it.
    """
    moments = _name_of(moments)
    if callable(moments) and not isinstance(moments, type):
        return partial(_checked, moments, b1, name)
    _checked(moments, b1, name)
    return cast("Moments", moments)


def _checked(moments: Any, b1: Numeric, name: str, *leaf: Any) -> Format:
    format = get(moments(*leaf) if leaf else moments)
    if isinstance(b1, float) and b1 > (most := answer(format, "largest_b1")):
        where = f" at {leaf[0] or 'the root'}" if leaf else ""
        raise ValueError(
            f"{name} is {b1:g}, and moments{where} is {format!r}; expected at most {most}, as"
            " beyond it this format turns and lengthens updates. Use moments='8bit'."
        )
    return format


def with_mu_dtype(moments: Moments, mu_dtype: DTypeLike | None) -> Moments:
    """`moments`, or in its place what optax's argument `mu_dtype` stands for, if it is given.

    Raises:
      TypeError, ValueError: both are given; mu cannot be stored in this dtype.
    """
    if mu_dtype is None:
        return moments
    if check_moments(moments) != "float32":
        raise TypeError(
            f"found mu_dtype={shown(mu_dtype)} and moments={shown(moments)}; expected one of them,"
            " such as moments=Pair(mu=Rounded(), nu=Factored()) for two formats."
        )
    dtype = jnp.result_type(jnp.dtype(mu_dtype))
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"mu_dtype is {dtype.name}; expected None, bfloat16 or float32, which is float64 for"
            " float64 leaves and complex for complex ones. See moments= for other formats."
        )
    return "float32" if dtype == jnp.float32 else Pair(Rounded(stochastic=False, least=0), Exact())


def choose_formats(moments: Moments, tree: PyTree) -> list[Format | None]:
    """The format of every leaf; None for a leaf that is kept in float32 or wider."""
    chosen: list[Format | None] = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        format = get(moments(path_name(path), leaf) if callable(moments) else moments)
        lean = format.holds(jnp.shape(leaf), jnp.result_type(leaf))
        chosen.append(format if lean and format != FORMATS["float32"] else None)
    return chosen


def _name_of(moments: Any) -> Any:
    if moments is None:
        return "float32"
    if isinstance(moments, type | np.dtype) and moments in (jnp.float32, jnp.bfloat16):
        return jnp.dtype(moments).name
    return moments
