"""`describe`: what every leaf's moments are stored as."""

import math
from collections.abc import Iterator
from typing import Any, cast

import jax

from adamfn.formats.eight_bit import EightBitMu
from adamfn.formats.linear import LinearCodes
from adamfn.trees import PyTree, path_name
from adamfn.trees import describe as describe_array

_SCALARS = ("count", "mu_product", "learning_rate")
"""What states of moments keep besides."""


def describe(state: PyTree) -> str:
    """A table of what every leaf's moments are stored as, with bytes and shares of the whole.

    A leaf that its format cannot hold shows as float32.

    Args:
      state: any tree with states of moments in it, such as a recipe's. An abstract one, of
        `jax.eval_shape(tx.init, params)`, costs no memory.

    Returns:
      A line for each leaf and one for the sum.

    Raises:
      ValueError: there are no moments in it.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> params = {"embedding": jnp.zeros((512, 64)), "kernel": jnp.zeros((64, 256))}
    >>> def choose(path, leaf):
    ...     return "float32" if path == "embedding" else "8bit"
    >>> state = adamfn.adam(moments=choose).init(params)
    >>> print(adamfn.formats.describe(state))  # doctest: +ELLIPSIS
    embedding         262,144 bytes  88.7%  mu float32[512,64]; nu float32[512,64]
    kernel             33,536 bytes  11.3%  mu int8[64,256] + float32[64,1]; nu uint8...
                      295,680 bytes in all
    """
    nodes = [n for n in jax.tree.leaves(state, is_leaf=_holds_moments) if _holds_moments(n)]
    if not any(jax.tree.leaves(node.mu) for node in nodes):
        raise ValueError(
            f"describe: found no moments in a {type(state).__name__}; expected a state of adamfn's,"
            " with mu and nu, by itself or inside a chain or a wrapper."
        )
    rows: list[tuple[str, int, list[str]]] = []
    for node in nodes:
        fields = [field for field in node._fields if field not in _SCALARS]
        for path, parts in _leaves((), [getattr(node, field) for field in fields]):
            size = sum(_bytes(part) for part in parts)
            stored = [f"{field} {_arrays(part)}" for field, part in zip(fields, parts, strict=True)]
            rows.append((path_name(path) or "the leaf", size, stored))
    whole = max(sum(size for _, size, _ in rows), 1)
    width = max(len(path) for path, _, _ in rows)
    lines = [
        f"{path:<{width}} {size:>15,} bytes {size / whole:>6.1%}  {'; '.join(stored)}"
        for path, size, stored in rows
    ]
    return "\n".join([*lines, f"{'':<{width}} {whole:>15,} bytes in all"])


def _holds_moments(node: Any) -> bool:
    return {"mu", "nu"} <= set(getattr(node, "_fields", ()))


def _leaves(path: Any, trees: list[PyTree]) -> Iterator[tuple[Any, list[PyTree]]]:
    """The parts that the trees have in corresponding places, down to where they differ in kind."""
    first, *others = (_children(tree) for tree in trees)
    kinds = {type(tree) for tree in trees}
    keys = [key for key, _ in first]
    inner = () not in keys and len(kinds) == 1 and all([k for k, _ in o] == keys for o in others)
    if not inner or isinstance(trees[0], EightBitMu | LinearCodes):
        yield path, trees
        return
    for key, *parts in (
        (key, *(dict(children)[key] for children in (first, *others))) for key in keys
    ):
        yield from _leaves((*path, *key), parts)


def _children(tree: PyTree) -> list[tuple[Any, PyTree]]:
    below = jax.tree.leaves_with_path(tree, is_leaf=lambda node: node is not tree)
    return cast("list[tuple[Any, PyTree]]", below)


def _arrays(part: PyTree) -> str:
    return " + ".join(map(describe_array, jax.tree.leaves(part)))


def _bytes(part: PyTree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(part))
