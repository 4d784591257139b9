# SPDX-License-Identifier: Apache-2.0
"""`round_weights`: weights in 16 bits that train, as the last stage of a chain."""

from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp

from adamfn.chains.chain import from_stage
from adamfn.chains.leaves import has_field, kept_by_path
from adamfn.chains.transform import GradientTransformation
from adamfn.core.stage import EmptyState, Stage, exported_state
from adamfn.core.weights import Weights
from adamfn.trees import (
    Numeric,
    PyTree,
    check_swapped,
    described,
    matching_leaves,
    path_name,
    shown,
)


@exported_state
class RoundWeightsState(NamedTuple):
    """State of `round_weights` that keeps more than 16 bits."""

    correction: PyTree
    """The lower bits of bfloat16 weights, int8 or int16 of their shapes; None for other leaves."""


def round_weights(
    bits: Literal[16, 24, 32] = 24, *, seed: Numeric | None = None
) -> GradientTransformation:
    r"""Makes bfloat16 weights train as wider ones do: the last stage of a chain.

    An update below a five-hundredth of its bfloat16 weight is lost when their sum is rounded to
    nearest, and training stalls. Here the float32 sum is rounded up or down to so many bits, with
    probabilities that make it right on average, and bits that bfloat16 cannot hold are kept beside:

    | bits | kept of a weight                    | bytes |                                       |
    |------|-------------------------------------|-------|---------------------------------------|
    | 16   | its bfloat16                        | 2     | right on average, noisy               |
    | 24   | and a correction of 8 bits          | 3     | noise 256 times smaller               |
    | 32   | and a correction of 16 bits         | 4     | all of float32's, without noise       |

    Updates are float32, `new - old`, and land exactly on the new bfloat16 in `adamfn.step` and in
    optax's and adamfn's `apply_updates`. (Equinox's makes the weights float32.) In place of
    `optax.apply_if_finite`, which takes no wider updates, use `skip_outliers(sigmas=math.inf)`.
    The other stages of the chain see the weight with its correction. Float32 and wider leaves pass
    unchanged; float16 and float8 leaves are refused. `update` needs `params`. Source: Zamirai et
    al., Revisiting BFloat16 Training, 2020, section 4 (arXiv 2010.06192).

    >>> import adamfn, jax.numpy as jnp
    >>> tx, params = adamfn.chain(adamfn.adam(1e-4), adamfn.round_weights(24)), jnp.bfloat16(1.0)
    >>> state = tx.init(params)
    >>> for _ in range(100):  # without it the weight would stay at 1
    ...     params, state = adamfn.step(tx, jnp.float32(1.0), state, params)
    >>> print(abs(adamfn.whole_weights(params, state) - 0.99) < 1e-4)
    True
    """
    if bits not in (16, 24, 32):
        raise ValueError(f"round_weights: bits is {shown(bits)}; expected 16, 24 or 32.")
    weights = Weights(bits)

    def first(leaf: Any) -> jax.Array | None:
        return jnp.zeros_like(leaf, weights.correction) if _is_bfloat16(leaf) else None

    keeps = {} if weights.correction is None else {"correction": first}
    state, mask = RoundWeightsState if keeps else EmptyState, _bfloat16_leaves
    stage = Stage("round_weights", weights, ("params",), keeps, state=state, mask=mask, seed=seed)
    return from_stage(stage)


def whole_weights(params: PyTree, state: PyTree) -> PyTree:
    """The float32 weights that bfloat16 parameters and a state stand for.

    Evaluate, export and hand these to other libraries. The state is that of a chain with
    `round_weights`, in wrappers or not. Leaves that are not bfloat16 are returned as they are.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.chain(adamfn.adam(1e-4), adamfn.round_weights(32))
    >>> params, state = adamfn.narrow_weights(jnp.float32(1.001), jnp.bfloat16(1.0), tx)
    >>> print(params, adamfn.whole_weights(params, state))
    1 1.001
    """
    check_swapped("whole_weights(params, state)", state, params)
    found = kept_by_path("correction", state)

    def whole(path: Any, p: Any) -> Any:
        if not _is_bfloat16(p):
            return p
        wide, correction = p.astype(jnp.float32), found.get(path)
        if correction is None:
            return wide
        return _weights_of("whole_weights", path, p, correction).decode(wide, correction)

    return jax.tree.map_with_path(whole, params)


def narrow_weights(
    whole: PyTree, params: PyTree, state: PyTree | GradientTransformation
) -> tuple[PyTree, PyTree]:
    """Float32 weights as bfloat16 parameters and a state: the inverse of `whole_weights`.

    `params`, arrays or `jax.ShapeDtypeStruct`s, have the dtypes that are wanted. The state is to
    hold the lower bits; in its place a transformation makes a first state. Bits that are not kept
    are rounded to nearest.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.chain(adamfn.adam(1e-4), adamfn.round_weights(32))
    >>> whole = jnp.array([1.0, 1.001])
    >>> params, state = adamfn.narrow_weights(whole, whole.astype(jnp.bfloat16), tx)
    >>> print(params, adamfn.whole_weights(params, state))
    [1 1] [1.    1.001]
    """
    way_out = "Pass the weights of these parameters."
    matching_leaves("narrow_weights: whole", whole, "params", params, way_out)
    narrow = jax.tree.map(lambda w, p: w.astype(p.dtype), whole, params)
    if callable(getattr(state, "init", None)):
        state = cast("GradientTransformation", state).init(narrow)
    weights, landed = (dict(jax.tree.leaves_with_path(tree)) for tree in (whole, narrow))

    def correction(path: Any, old: Any) -> Any:
        if not _is_bfloat16(landed.get(path)):
            raise ValueError(
                f"narrow_weights: the state has a correction at {path_name(path)}, and no"
                " parameter there is bfloat16; expected the state of these parameters."
            )
        p, lower = _weights_of("narrow_weights", path, weights[path], old).split(weights[path])
        landed[path] = p.astype(jnp.bfloat16)
        return lower.astype(old.dtype)

    def filled(node: Any) -> Any:
        if not has_field(node, "correction"):
            return node
        return node._replace(correction=jax.tree.map_with_path(correction, node.correction))

    state = jax.tree.map(filled, state, is_leaf=lambda node: has_field(node, "correction"))
    return jax.tree.map_with_path(lambda path, _: landed[path], narrow), state


def _weights_of(name: str, path: Any, leaf: Any, correction: Any) -> Weights:
    """How a weight was rounded that has this correction."""
    if leaf.shape != correction.shape:
        raise ValueError(
            f"{name}: at {path_name(path) or 'the root'} the weight is {described(leaf)} and its"
            f" correction {described(correction)}; expected one shape, those of one run."
        )
    return Weights(24 if correction.dtype.itemsize == 1 else 32)


def _is_bfloat16(leaf: Any) -> bool:
    return getattr(leaf, "dtype", None) == jnp.bfloat16


def _bfloat16_leaves(params: PyTree) -> PyTree:
    """The mask of bfloat16 leaves."""

    def rounds(path: Any, leaf: Any) -> bool:
        if not _is_bfloat16(leaf) and jnp.finfo(jnp.result_type(leaf)).bits < 32:
            raise TypeError(
                f"round_weights: the leaf at {path_name(path) or 'the root'} is {described(leaf)};"
                " expected bfloat16, or float32 and wider, which need no rounding. Convert it with"
                " .astype(jnp.bfloat16)."
            )
        return _is_bfloat16(leaf)

    return jax.tree.map_with_path(rounds, params)
