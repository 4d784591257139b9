"""Which format each leaf's moments are stored in."""

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from adamfn.formats.base import Format
from adamfn.formats.names import get, name_of
from adamfn.trees import PyTree, path_name

Moments: TypeAlias = str | Format | DTypeLike | Callable[[str, Any], Any] | None
"""How moments are stored: a format's name, a format, `jnp.float32` or `jnp.bfloat16`, None for
float32, or a function that chooses one for each leaf
from its path, such as `layers/0/kernel`, and the leaf: the parameter at `init` and its gradient at
`update`, so path and shape are to decide."""


def check_moments(moments: Any) -> Moments:
    """Returns `moments` if it can be one; a dtype or None as the format's name.

    Raises:
      TypeError, ValueError: it is not a name, a format or a function.
    """
    moments = name_of(moments)
    if not callable(moments) or isinstance(moments, type):
        get(moments)
    return cast("Moments", moments)


def choose_formats(moments: Moments, tree: PyTree) -> list[Format | None]:
    """The format of every leaf; None for what is kept in float32 or wider."""
    if isinstance(moments, str) and moments == "float32":
        return [None] * len(jax.tree.leaves(tree))
    chosen: list[Format | None] = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        format = get(moments(path_name(path), leaf) if callable(moments) else moments)
        exact = format == get("float32") or not format.holds(jnp.shape(leaf), jnp.result_type(leaf))
        chosen.append(None if exact else format)
    return chosen
