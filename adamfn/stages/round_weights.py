"""`round_weights`: weights in 16 bits that train, as the last stage of a chain."""

from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp

from adamfn.chains.chain import from_stage
from adamfn.chains.transform import GradientTransformation
from adamfn.core.stage import EmptyState, Stage, exported_state
from adamfn.core.weights import Weights
from adamfn.trees import PyTree, describe, path_name


@exported_state
class RoundWeightsState(NamedTuple):
    """State of `round_weights` that keeps more than 16 bits."""

    correction: PyTree
    """The lower bits of bfloat16 weights: the parameters' tree and shapes, int8 or int16; None for
    other leaves."""


def round_weights(bits: Literal[16, 24, 32] = 24) -> GradientTransformation:
    r"""Makes bfloat16 weights train as wider ones do: the last stage of a chain.

    An update below a five-hundredth of its bfloat16 weight is lost when their sum is rounded to
    nearest, and training stalls. Here the float32 sum is rounded to so many bits up or down, with
    probabilities that make it right on average, and what bfloat16 cannot hold is kept beside it:

    | bits | kept of a weight                    | bytes |                                       |
    |------|-------------------------------------|-------|---------------------------------------|
    | 16   | its bfloat16                        | 2     | right on average, noisy               |
    | 24   | and a correction of 8 bits          | 3     | noise 256 times smaller               |
    | 32   | and one of 16 bits                  | 4     | float32 to the bit, without noise     |

    The updates are float32, `new - old`, and any `apply_updates` of theirs lands on the bfloat16
    that is meant. The other stages of the chain see the weight with its correction. Float32 leaves
    and wider ones pass as they are.

    Args:
      bits: how many bits of each weight are kept.

    Returns:
      A `GradientTransformation`, whose `update` needs `params`.

    Raises:
      ValueError: other bits; at `chain`, a stage after it.
      TypeError: at `init` and `update`, a float16 or float8 leaf; names it.

    References:
      Zamirai et al., Revisiting BFloat16 Training, 2020 (arXiv 2010.06192), section 4, for
      stochastic rounding and for a second 16-bit number beside the weight.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> params = jnp.ones(2, jnp.bfloat16)
    >>> plain = adamfn.adam(1e-4)
    >>> tx = adamfn.chain(plain, adamfn.round_weights(24))
    >>> state, lost, stalled = tx.init(params), plain.init(params), params
    >>> for _ in range(100):
    ...     params, state = adamfn.step(tx, jnp.ones(2), state, params)
    ...     stalled, lost = adamfn.step(plain, jnp.ones(2), lost, stalled)
    >>> print(abs(adamfn.whole_weights(params, state) - 0.99) < 1e-4, stalled)
    [ True  True] [1 1]
    """
    if bits not in (16, 24, 32):
        raise ValueError(f"round_weights: bits is {bits!r}; expected 16, 24 or 32.")
    weights = Weights(bits)

    def first(leaf: Any) -> jax.Array | None:
        return jnp.zeros_like(leaf, weights.correction) if _is_bfloat16(leaf) else None

    keeps = {} if weights.correction is None else {"correction": first}
    return from_stage(
        Stage(
            "round_weights",
            weights,
            reads=("params",),
            keeps=keeps,
            state=RoundWeightsState if keeps else EmptyState,
            mask=_bfloat16_leaves,
        )
    )


def whole_weights(params: PyTree, state: PyTree) -> PyTree:
    """The float32 weights that bfloat16 parameters and a state stand for.

    They are what to evaluate, to export and to hand to other libraries.

    Args:
      params: the parameters.
      state: the state of a chain with `round_weights`, alone or inside of wrappers.

    Returns:
      The parameters' tree: float32 in place of bfloat16, and other leaves as they are.

    Raises:
      ValueError: a correction is of another shape than its parameter; names the leaf.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.chain(adamfn.adam(1e-4), adamfn.round_weights(32))
    >>> params, state = adamfn.narrow_weights(jnp.float32(1.001), jnp.bfloat16(1.0), tx)
    >>> print(params, adamfn.whole_weights(params, state))
    1 1.001
    """
    nodes = rounding_states(state)
    found = {path: c for node in nodes for path, c in _by_path(node.correction).items()}

    def whole(path: Any, p: Any) -> Any:
        if not _is_bfloat16(p):
            return p
        correction = found.get(jax.tree_util.keystr(path))
        if correction is None:
            return p.astype(jnp.float32)
        _check_shape("whole_weights", path, p, correction)
        return _weights_of(correction).decode(p.astype(jnp.float32), correction)

    return jax.tree.map_with_path(whole, params)


def narrow_weights(
    whole: PyTree, params: PyTree, state: PyTree | GradientTransformation
) -> tuple[PyTree, PyTree]:
    """Float32 weights as bfloat16 parameters and a state: the inverse of `whole_weights`.

    Args:
      whole: the weights, float32 where parameters are bfloat16.
      params: parameters whose dtypes are wanted, arrays or `jax.ShapeDtypeStruct`s.
      state: the state that is to hold their lower bits; or the transformation, for a first state.

    Returns:
      The parameters and the state. Bits that are not kept are rounded to nearest.

    Raises:
      ValueError: the trees differ in structure or shapes; names the leaf.

    >>> import adamfn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> tx = adamfn.chain(adamfn.adam(1e-4), adamfn.round_weights(32))
    >>> whole = {"w": jnp.array([1.0, 1.001])}
    >>> params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), whole)
    >>> params, state = adamfn.narrow_weights(whole, params, tx)
    >>> print(params["w"], adamfn.whole_weights(params, state)["w"])
    [1 1] [1.    1.001]
    """
    _check_alike(whole, params)
    narrow = jax.tree.map(lambda w, p: w.astype(p.dtype), whole, params)
    if callable(getattr(state, "init", None)):
        state = cast("GradientTransformation", state).init(narrow)
    found: dict[str, tuple[Any, Any]] = {
        jax.tree_util.keystr(path): (path, w) for path, w in jax.tree.leaves_with_path(whole)
    }
    landed: dict[str, jax.Array] = {}

    def filled(node: Any) -> Any:
        def correction(path: Any, old: Any) -> Any:
            key = jax.tree_util.keystr(path)
            if key not in found:
                raise ValueError(
                    f"narrow_weights: the state has a correction at {path_name(path)}, and the"
                    " weights have no such leaf; expected the state of these parameters."
                )
            _check_shape("narrow_weights", path, found[key][1], old)
            p, lower = _weights_of(old).split(found[key][1])
            landed[key] = p.astype(jnp.bfloat16)
            return lower.astype(old.dtype)

        if not _is_state(node):
            return node
        return node._replace(correction=jax.tree.map_with_path(correction, node.correction))

    state = jax.tree.map(filled, state, is_leaf=_is_state)
    narrow = jax.tree.map_with_path(
        lambda path, p: landed.get(jax.tree_util.keystr(path), p), narrow
    )
    return narrow, state


def _weights_of(correction: Any) -> Weights:
    return Weights(24 if correction.dtype.itemsize == 1 else 32)


def _is_bfloat16(leaf: Any) -> bool:
    return getattr(leaf, "dtype", None) == jnp.bfloat16


def _bfloat16_leaves(params: PyTree) -> PyTree:
    def rounds(path: Any, leaf: Any) -> bool:
        if not _is_bfloat16(leaf) and jnp.finfo(jnp.result_type(leaf)).bits < 32:
            raise TypeError(
                f"round_weights: the leaf at {path_name(path) or 'the root'} is {describe(leaf)};"
                " expected bfloat16, or float32 and wider, which need no rounding. Convert it with"
                " .astype(jnp.bfloat16)."
            )
        return _is_bfloat16(leaf)

    return jax.tree.map_with_path(rounds, params)


def _is_state(node: Any) -> bool:
    return "correction" in getattr(node, "_fields", ())


def rounding_states(state: PyTree) -> list[RoundWeightsState]:
    """The states of `round_weights` inside of a state."""
    nodes = jax.tree.leaves(state, is_leaf=_is_state)
    return [node for node in nodes if _is_state(node)]


def _by_path(tree: PyTree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _check_shape(name: str, path: Any, leaf: Any, correction: Any) -> None:
    if leaf.shape != correction.shape:
        raise ValueError(
            f"{name}: at {path_name(path) or 'the root'} the weight is {describe(leaf)} and its"
            f" correction {describe(correction)}; expected one shape, those of one run."
        )


def _check_alike(whole: PyTree, params: PyTree) -> None:
    if jax.tree.structure(whole) != jax.tree.structure(params):
        raise ValueError(
            f"narrow_weights: the weights are {jax.tree.structure(whole)} and the params"
            f" {jax.tree.structure(params)}; expected trees of one structure."
        )
