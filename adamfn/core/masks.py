# SPDX-License-Identifier: Apache-2.0
"""Masks: which leaves a stage changes, by their paths and axes or by a tree of bools.

`matrices`, `named` and `matching` return functions from parameters, in any container, to a tree of
bools; `layerwise_decay` returns one to a tree of factors.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from adamfn.trees import PyTree, is_masked, path_name, shown, structure_name

__all__ = ["layerwise_decay", "matching", "matrices", "named"]

Mask: TypeAlias = PyTree | Callable[[PyTree], PyTree] | None
"""A tree of bools of the parameters' structure or a prefix of it; a function that makes one from
the parameters; or None."""

_USUAL = ("bias", "norm", "embed")


def matrices(
    but: Sequence[str] = _USUAL, stacked: Sequence[str] = ()
) -> Callable[[PyTree], PyTree]:
    """A mask of the matrices of a model, which are usually decayed.

    It has the leaves of two axes at least, except those with one of some names in their paths, such
    as `embed` in `token_embedding/kernel`: a table of embeddings has rows that are separate
    vectors, and `bias`: attention has biases of several axes.

    Args:
      but: names, or parts of names, of leaves to leave out, in upper or lower case.
      stacked: names of parts that hold layers along their first axis, which is then not counted.

    Raises:
      TypeError: names are not a list of strings.
      ValueError: at `init`, no leaf has one of the names; those of the default may be missing.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> layers = {"kernel": jnp.ones((3, 4, 4)), "scale": jnp.ones((3, 4))}
    >>> params = {"embedding": jnp.ones((9, 4)), "layers": layers, "head": jnp.ones((4, 9))}
    >>> adamfn.masks.matrices(stacked=["layers"])(params)
    {'embedding': False, 'head': True, 'layers': {'kernel': True, 'scale': False}}
    >>> tx = adamfn.adamw(weight_decay=0.1, mask=adamfn.masks.matrices(stacked=["layers"]))
    """
    left_out, layered = _having("but", but), _having("stacked", stacked)

    def decays(leaf: Any, out: bool, layers: bool) -> bool:
        return jnp.ndim(leaf) - layers >= 2 and not out

    return lambda params: jax.tree.map(decays, params, left_out(params), layered(params))


def named(*names: str) -> Callable[[PyTree], PyTree]:
    """A mask of the leaves with one of some names in their paths; names and errors as `matrices`.

    >>> import adamfn
    >>> adamfn.masks.named("layers")({"layers": {"kernel": 1.0}, "head": 1.0})
    {'head': False, 'layers': {'kernel': True}}
    """
    return _having("named", names)


def matching(*patterns: str) -> Callable[[PyTree], PyTree]:
    r"""A mask of the leaves whose path matches one of some regular expressions.

    They are searched for anywhere in a path such as `layers/0/kernel`; `^` and `$` match its ends.

    >>> import adamfn
    >>> params = {"layers": [{"kernel": 1.0, "bias": 1.0}], "head": {"kernel": 1.0}}
    >>> adamfn.masks.matching(r"layers/\d+/kernel$")(params)
    {'head': {'kernel': False}, 'layers': [{'bias': False, 'kernel': True}]}
    """
    return _matching("matching", {text: _compiled(text, "matching") for text in patterns})


def layerwise_decay(
    decay: float,
    layers: str = r"layers[/_](\d+)",
    *,
    below: Sequence[str] = ("embed",),
    stacked: Sequence[str] = (),
) -> Callable[[PyTree], PyTree]:
    r"""Factors of the learning rate that fall with the distance from the output, for fine-tuning.

    Of n layers, the layer with the index i has the factor $\text{decay}^{n - i}$, leaves below the
    layers have $\text{decay}^{n + 1}$, and all others, such as the head, 1. To apply them, multiply
    the updates at the end of a chain. Source: Clark et al., ELECTRA, 2020 (arXiv 2003.10555).

    Args:
      decay: the factor from a layer to the one below it, above 0.
      layers: a regular expression, found in paths, whose group is the layer's index.
      below: names, as in `matrices`, of leaves below the layers; others are above.
      stacked: names of parts that hold layers along their first axis; a factor is then an array.

    >>> import adamfn, jax, jax.numpy as jnp, optax
    >>> factors = adamfn.masks.layerwise_decay(0.5)
    >>> params = {"embed": jnp.ones(2), "head": jnp.ones(2), "layers": [jnp.ones(2), jnp.ones(2)]}
    >>> factors(params)
    {'embed': 0.125, 'head': 1.0, 'layers': [0.25, 0.5]}
    >>> by_layer = optax.stateless(lambda us, p: jax.tree.map(jnp.multiply, us, factors(p)))
    >>> tx = adamfn.chain(adamfn.adamw(1e-3), by_layer)
    """
    pattern = _compiled(layers, "layers")
    under, stack = _having("below", below), _having("stacked", stacked)
    if pattern.groups != 1 or not decay > 0:
        raise ValueError(
            f"layerwise_decay: decay is {shown(decay)} and layers {shown(layers)}; expected a"
            " number above 0, and one group, of the index: 'layer_([0-9]+)'."
        )

    def place(path: Any, leaf: Any, is_under: bool, is_stacked: bool) -> Any:
        """The index of the layer that a leaf is in, or of its rows; infinite above all layers."""
        if is_stacked and jnp.ndim(leaf):
            return np.arange(jnp.shape(leaf)[0]).reshape(-1, *[1] * (jnp.ndim(leaf) - 1))
        found = pattern.search(path_name(path))
        return int(found[1]) if found else -1 if is_under else np.inf

    def factors(params: PyTree) -> PyTree:
        places = jax.tree.map_with_path(place, params, under(params), stack(params))
        indices = [np.max(x, initial=-1) for x in jax.tree.leaves(places) if np.all(x < np.inf)]
        if (top := max(indices, default=-1)) < 0 and jax.tree.leaves(params):
            first, *_ = jax.tree.leaves_with_path(params)
            raise ValueError(
                f"layerwise_decay: found no layer by layers={shown(layers)} and"
                f" stacked={shown(stacked)}; expected one in such paths as {path_name(first[0])!r}."
            )

        def factor(x: Any) -> Any:
            power = decay ** np.maximum(top + 1 - x, 0.0)  # 1 above the layers
            return np.float32(power) if np.ndim(x) else float(power)

        return jax.tree.map(factor, places)

    return factors


def _compiled(pattern: str, what: str) -> re.Pattern[str]:
    if not isinstance(pattern, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{what} is {shown(pattern)}; expected a regular expression, a string.")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{what} is {shown(pattern)}, which is no regular expression: {error}."
        ) from error


def _having(what: str, names: Sequence[str]) -> Callable[[PyTree], PyTree]:
    """The mask of leaves with one of some names in their paths."""
    is_list = isinstance(names, list | tuple | set | frozenset)
    if not is_list or not all(isinstance(name, str) for name in names):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"{what} is {shown(names)}; expected names, a list of strings. Call it without the"
            " parameters, mask=adamfn.masks.matrices(): its result is given them."
        )
    return _matching(what, {name: re.compile(re.escape(name), re.IGNORECASE) for name in names})


def _matching(what: str, patterns: Mapping[str, re.Pattern[str]]) -> Callable[[PyTree], PyTree]:
    """The mask of leaves in whose path one of some patterns is. Each must be in some path."""

    def mask(params: PyTree) -> PyTree:
        leaves = jax.tree.leaves_with_path(params, is_leaf=is_masked)  # of other groups too
        paths = [path_name(path) for path, _ in leaves]
        for text, pattern in patterns.items():
            if paths and text not in _USUAL and not any(map(pattern.search, paths)):
                raise ValueError(
                    f"{what}: no leaf has {text!r} in its path; expected part of a path such as"
                    f" {', '.join(map(repr, paths[:3]))}. Leave it out, or correct it."
                )
        return jax.tree.map_with_path(
            lambda path, _: any(found.search(path_name(path)) for found in patterns.values()),
            params,
        )

    return mask


def broadcast_mask(name: str, mask: Mask, params: PyTree) -> list[bool]:
    """Whether the mask of the stage with this name has each leaf of the parameters, in order."""
    # A function is a leaf; a module that can be called is a tree (optax issue 1007).
    if callable(mask) and jax.tree_util.all_leaves([mask]):
        try:
            found = mask(params)
            if found is False and any(map(mask, jax.tree.leaves(params))):  # jnp.ndim(tree) is 0
                raise TypeError("it is False of the tree, and True of a leaf")
            mask = found
        except (AttributeError, TypeError) as error:
            if str(error).startswith(name):
                raise
            raise TypeError(
                f"{name}: its mask raised {type(error).__name__}: {error}. Expected a function of"
                " the tree of all parameters that makes a tree of bools. Of one leaf:"
                " lambda params: jax.tree.map(lambda p: p.ndim > 1, params); of its path too:"
                " jax.tree.map_with_path."
            ) from error
    for path, leaf in jax.tree.leaves_with_path(mask):
        if not isinstance(leaf, bool | np.bool_):
            raise TypeError(
                f"{name}: the mask at {jax.tree_util.keystr(path) or 'the root'} is {shown(leaf)};"
                " expected True or False, known when the step is traced. adamfn.masks.named('w')"
                " makes a mask of names."
            )
    try:
        return [bool(yes) for yes in jax.tree.leaves(jax.tree.broadcast(mask, params))]
    except ValueError as error:
        raise ValueError(
            f"{name}: the mask's structure is not that of the parameters, nor a prefix"
            f" of it: found {structure_name(mask)}, expected {structure_name(params)}."
        ) from error
