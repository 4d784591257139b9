# SPDX-License-Identifier: Apache-2.0
"""Stages that look at all gradients before any average: clipping by their norm, and skipping."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from adamfn.chains.chain import from_stage
from adamfn.chains.transform import GradientTransformation
from adamfn.core.averages import increment
from adamfn.core.formulas import multiply, unchanged
from adamfn.core.hyperparameters import ScalarOrSchedule, scalar, scheduled, value_at
from adamfn.core.stage import Scalars, Stage, exported_state
from adamfn.trees import Numeric, described, real_dtype, shown, wide_dtype, widened


@exported_state
class ClipByGlobalNormState(NamedTuple):
    """State of `clip_by_global_norm`."""

    grad_norm: jax.Array
    """The norm of the last step's gradients, to be logged."""


def clip_by_global_norm(max_norm: ScalarOrSchedule) -> GradientTransformation:
    r"""Scales all gradients down if their norm, taken over all of them, exceeds a bound.

    $$ g \leftarrow g \min(1, r / \lVert g \rVert), \qquad
    \lVert g \rVert^2 = \textstyle\sum |g_i|^2 $$

    The bound max_norm, r, is a number at least 0, a scalar array, or a function of the count. The
    norm takes one pass over the gradients, in float32 at least; the factor costs no other pass. It
    must be the first stage of a chain. `update(..., grad_norm=x)` takes x for the norm. Inside
    `jax.shard_map`, where gradients are shards, x is the root of the `jax.lax.psum` of their
    squares' sums. Source: Pascanu, Mikolov and Bengio, On the Difficulty of Training Recurrent
    Neural Networks, 2013, algorithm 1 (arXiv 1211.5063); as `optax.clip_by_global_norm`.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.chain(adamfn.clip_by_global_norm(1.0), adamfn.scale_by_lr(1.0))
    >>> grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates["a"], updates["b"], state[0].grad_norm)
    [-0.6] [-0.8] 5.0
    """
    configured = scheduled("max_norm", max_norm)

    def scalars(count: jax.Array, state: Any, extra: Mapping[str, Any]) -> Scalars:
        norm, bound = _grad_norm(extra), value_at("max_norm", configured, count - 1)
        within = norm <= bound  # of NaN neither: the factor is NaN, as optax's
        return (jnp.where(within, 1, bound / jnp.where(within, 1, norm)),), {"grad_norm": norm}

    start, takes = {"grad_norm": lambda: jnp.zeros((), float)}, ("grads", "grad_norm")
    name, state = "clip_by_global_norm", ClipByGlobalNormState
    return from_stage(Stage(name, multiply, scalars=scalars, start=start, state=state, takes=takes))


@exported_state
class SkipOutliersState(NamedTuple):
    """State of `skip_outliers`."""

    seen: jax.Array
    """Steps whose values have entered the window: int32 scalar."""
    skipped: jax.Array
    """Steps skipped: int32 scalar."""
    taken: jax.Array
    """Whether the last step was taken: bool scalar."""
    recent: jax.Array
    """The watched values of the last steps: float32 of shape (watched, window)."""


def skip_outliers(
    watched: Sequence[Literal["loss", "grad_norm"]] = ("loss", "grad_norm"),
    window: int = 128,
    sigmas: Numeric = 6.0,
) -> GradientTransformation:
    r"""Skips a step if the loss or the gradients' norm is far above its recent mean.

    With the mean and the standard deviation (of n - 1) of the last `window` values, a step is taken
    if every watched value x is finite and

    $$ x \le \operatorname{mean} + \text{sigmas} \cdot \operatorname{std} $$

    The watched values are `"loss"`, which `update(..., loss=x)` must then be given, `"grad_norm"`,
    the norm of all gradients, or both. On a skipped step the updates are zero, and the other adamfn
    stages of the chain keep their states: moments, counts, and with them corrections and schedules.
    Until the window has seen half of its steps, and 20 at least, every finite step is taken. Finite
    values enter the window on skipped steps too, so that a lasting change becomes the new mean.
    `state[0].skipped` counts the skipped steps. With `sigmas=math.inf` only steps that are not
    finite are skipped, as by `optax.apply_if_finite`, which refuses updates wider than gradients:
    those of `round_weights`, and of float16 gradients of wider parameters.

    It comes first in a chain. Transformations of other libraries, which it cannot hold, may only
    stand before it; `update` refuses it where no stage follows, as inside `optax.chain`, which may
    still be around the whole chain. Sources: OLMo-core's `SkipStepOptimizer`, with this window and
    sigmas, which also skips values far below the mean; MaxText's `skip_step_on_spikes`.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.chain(adamfn.skip_outliers(["loss"]), adamfn.adam(0.1))
    >>> params = jnp.zeros(1)
    >>> state = tx.init(params)
    >>> for loss in [2.0, 2.1] * 34 + [2.0, 50.0]:
    ...     params, state = adamfn.step(tx, jnp.ones(1), state, params, loss=loss)
    >>> print(state[0].skipped, state[1][0].count)
    1 69
    """
    is_list = isinstance(watched, Sequence) and not isinstance(watched, str)  # pyright: ignore[reportUnnecessaryIsInstance]
    names = [name for name in ("loss", "grad_norm") if is_list and name in watched]
    if not names or any(name not in names for name in watched):
        raise ValueError(
            f"watched is {shown(watched)}; expected a list of 'loss', 'grad_norm' or both."
        )
    if not isinstance(window, int) or window < 2:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"window is {shown(window)}; expected a number of steps, at least 2.")
    all_finite = isinstance(sigmas, float) and sigmas == math.inf
    sigmas, waits = 0.0 if all_finite else scalar("sigmas", sigmas), max(20, window // 2)

    def scalars(count: jax.Array, state: Any, extra: Mapping[str, Any]) -> Scalars:
        values = [_watched(name, extra, state.recent.dtype) for name in names]
        found = jnp.concatenate([*map(jnp.atleast_1d, values)])  # as in `Step.vector`
        finite = jnp.all(jnp.isfinite(found))
        usual = jnp.all(_are_usual(found, state.recent, state.seen, sigmas))
        taken = finite & (usual | all_finite | (state.seen + 1 < waits))
        entered = state.recent.at[:, state.seen % window].set(found)
        return (), {
            "seen": jnp.where(finite, increment(state.seen), state.seen),
            "skipped": jnp.where(taken, state.skipped, increment(state.skipped)),
            "taken": taken,
            "recent": jnp.where(finite, entered, state.recent),
        }

    zero = partial(jnp.zeros, (), jnp.int32)
    start = {
        **{"seen": zero, "skipped": zero, "taken": lambda: jnp.ones((), bool)},
        "recent": lambda: jnp.zeros((len(names), window), jnp.float32),
    }
    name, state, takes = "skip_outliers", SkipOutliersState, ("grads", *names)
    return from_stage(
        Stage(name, unchanged, scalars=scalars, start=start, state=state, takes=takes)
    )


def _watched(name: str, extra: Mapping[str, Any], dtype: Any) -> jax.Array:
    """The value of this step, if it is a real scalar."""
    value = _grad_norm(extra) if name == "grad_norm" else extra.get(name)
    if value is None:
        raise ValueError(
            "skip_outliers: update got no loss, and watches it. Call update(..., loss=x), or watch"
            " ['grad_norm'] alone."
        )
    kind = getattr(value, "dtype", type(value))
    real = any(jnp.issubdtype(kind, each) for each in (jnp.floating, jnp.integer, jnp.bool_))
    if getattr(value, "shape", ()) != () or not real:
        raise TypeError(
            f"skip_outliers: {name} is {described(value)}; expected a real number or a scalar"
            " array, such as the mean over the batch."
        )
    return jnp.asarray(value, dtype)


def _are_usual(found: jax.Array, recent: jax.Array, seen: jax.Array, sigmas: Numeric) -> jax.Array:
    """Whether each value is within the bound of its row of recent ones, some of them unseen yet.

    Values are in units of the row's largest exponent, so that no square overflows or vanishes, and
    relative to one of them, as a small deviation is lost in the sum of large values.
    """
    largest = jnp.max(jnp.abs(recent), axis=1)
    largest = jnp.where(largest > 0, largest, 1)
    unit = largest / (2 * jnp.frexp(largest)[0])  # a power of two, which rounds nothing
    first = recent[:, 0] / unit
    known = jnp.arange(recent.shape[1]) < seen
    number = jnp.minimum(seen, recent.shape[1]).astype(recent.dtype)
    shifted = recent / unit[:, None] - first[:, None]
    mean = jnp.sum(shifted, axis=1, where=known) / jnp.maximum(number, 1)
    squares = jnp.square(shifted - mean[:, None])
    variance = jnp.sum(squares, axis=1, where=known) / jnp.maximum(number - 1, 1)
    return found / unit - first <= mean + sigmas * jnp.sqrt(variance)


def _grad_norm(extra: Mapping[str, Any]) -> jax.Array:
    """The norm of all gradients: the extra argument `grad_norm`, or else computed."""
    given = extra.get("grad_norm")
    return jax.jit(_global_norm)(extra["grads"]) if given is None else jnp.asarray(given)


@jax.custom_jvp
def _global_norm(grads: Sequence[jax.Array]) -> jax.Array:
    """The norm, as long as it is in the range of its dtype: squares may overflow or vanish."""
    parts = _real_parts(grads)
    info = jnp.finfo(parts[0].dtype if parts else jnp.float32)
    scale = 2.0**80 if info.bits == 32 else 2.0**640

    def root(numbers: Sequence[jax.Array]) -> jax.Array:
        squares = [jnp.sum(jnp.square(x)) for x in numbers]
        return jnp.sqrt(sum(squares, start=jnp.zeros((), info.dtype)))

    usual = root(parts)
    is_usual = (usual > info.tiny**0.5 * 2.0**33) & (usual < jnp.inf)

    def other() -> jax.Array:
        # Selected, as XLA would make (x * scale)^2 a product with scale^2.
        large = [jnp.where(jnp.abs(x) <= 1, 0, x / scale) for x in parts]
        small = [jnp.where(jnp.abs(x) >= 1, 0, x * scale) for x in parts]
        return jnp.where(usual > 1, root(large) * scale, root(small) / scale)

    def either() -> jax.Array:
        return jnp.where(is_usual, usual, other())

    if not jax.sharding.get_abstract_mesh().empty:
        return either()  # JAX cannot vmap a condition on what explicit axes split
    # XLA takes the three sums in one pass, except on CPU; on GPU a condition would stop the host.
    condition = partial(jax.lax.cond, is_usual, lambda: usual, other)
    return jax.lax.platform_dependent(cpu=condition, default=either)


@_global_norm.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    norm = _global_norm(*primals)
    known = (norm > 0) & (norm < jnp.inf)  # elsewhere 0, without which a skipped step gives NaN
    size = jnp.where(known, norm, 1)
    pairs = zip(_real_parts(*primals), _real_parts(*tangents), strict=True)
    parts = [jnp.sum(jnp.where(known, x / size, 0) * dx) for x, dx in pairs]
    return norm, jnp.where(known, sum(parts, start=jnp.zeros_like(norm)), 0)


def _real_parts(grads: Sequence[jax.Array]) -> list[jax.Array]:
    """All numbers of the gradients, real, in the widest of their dtypes and float32 at least."""
    dtypes = [real_dtype(wide_dtype(g.dtype)) for g in grads]
    wide = [widened(g, max(dtypes, key=lambda dtype: dtype.itemsize)) for g in grads]
    return [x for g in wide for x in ((g.real, g.imag) if jnp.iscomplexobj(g) else (g,))]
