"""`skip_outliers`: no step where the loss or the gradients are far from those of late."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from adamfn.chains.chain import from_stage
from adamfn.chains.transform import GradientTransformation
from adamfn.core.averages import increment
from adamfn.core.formulas import unchanged
from adamfn.core.hyperparameters import scalar
from adamfn.core.stage import Scalars, Stage, exported_state
from adamfn.stages.norms import grad_norm_in
from adamfn.trees import describe

Watched = Literal["loss", "grad_norm"]


@exported_state
class SkipOutliersState(NamedTuple):
    """State of `skip_outliers`."""

    seen: chex.Array
    """Steps whose values have entered the window: int32 scalar."""
    skipped: chex.Array
    """Steps not taken: int32 scalar."""
    taken: chex.Array
    """Whether the last step was: bool scalar."""
    recent: chex.Array
    """What was watched in the last steps: float32 of shape (watched, window)."""


def skip_outliers(
    watched: Sequence[Watched] = ("loss", "grad_norm"),
    window: int = 128,
    sigmas: chex.Numeric = 6.0,
) -> GradientTransformation:
    r"""Takes no step where the loss or the gradients' norm lies far above its mean of late.

    With the mean and the standard deviation (of n - 1) of the last `window` values, a step is taken
    where, for all that is watched,

    $$ x \le \operatorname{mean} + \sigma \operatorname{std} $$

    and x is finite. Otherwise the updates are zero, and all that the stages of ours in the chain
    keep stays as it is: moments, counts, and with them corrections and schedules. Until half of
    the window, and at least 20 steps, have been seen, every finite step is taken. What is finite
    enters the window, taken or not, so that a lasting change becomes the new mean.

    Args:
      watched: `"loss"`, which `update(..., loss=x)` must then be given, `"grad_norm"`, the norm
        of all gradients, or both.
      window: how many values the mean is of, at least 2.
      sigmas: how many standard deviations are far, at least 0.

    Returns:
      A `GradientTransformation`. It comes first in a chain, and what is not ours may stand before
      it alone: that is not held back. `state[0].skipped` counts the steps that were not taken.

    Raises:
      TypeError, ValueError: an argument out of range; at `chain`, a place where it would not hold
        back what it should; at `update`, `loss` is missing, or no scalar.

    References:
      OLMo-core's `SkipStepOptimizer`, from which window and sigmas are, and MaxText's
      `skip_step_on_spikes`. OLMo-core also skips what lies far below the mean; MaxText does not.
      Both let values that are not finite into the window, and then skip what follows.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.chain(adamfn.skip_outliers(["loss"]), adamfn.adam(0.1))
    >>> params = jnp.zeros(1)
    >>> state = tx.init(params)
    >>> for step in range(70):
    ...     loss = 2.0 + 0.1 * (step % 2) if step < 69 else 50.0
    ...     params, state = adamfn.step(tx, jnp.ones(1), state, params, loss=loss)
    >>> print(state[0].skipped, state[1][0].count)
    1 69
    """
    is_list = isinstance(watched, Sequence) and not isinstance(watched, str)  # pyright: ignore[reportUnnecessaryIsInstance]
    names = [name for name in ("loss", "grad_norm") if is_list and name in watched]
    if not names or [name for name in watched if name not in names]:
        raise ValueError(f"watched is {watched!r}; expected a list of 'loss', 'grad_norm' or both.")
    if not isinstance(window, int) or window < 2:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"window is {window!r}; expected a number of steps, at least 2.")
    sigmas = scalar("sigmas", sigmas)
    waits = max(20, window // 2)

    def scalars(count: jax.Array, state: Any, extra: Mapping[str, Any]) -> Scalars:
        if extra.get("loss") is None and "loss" in names:
            raise ValueError(
                "skip_outliers: update got no loss, and watches it. Call update(..., loss=x), or"
                " watch ['grad_norm'] alone."
            )
        values = {"loss": extra.get("loss"), "grad_norm": None}
        if "grad_norm" in names:
            values["grad_norm"] = grad_norm_in(extra)
        for name in names:
            if getattr(values[name], "shape", ()) != () or not _is_real(values[name]):
                raise TypeError(
                    f"skip_outliers: {name} is {describe(values[name])}; expected a real number or a"
                    " scalar array, such as the mean over the batch."
                )
        found = jnp.stack([jnp.asarray(values[name], state.recent.dtype) for name in names])
        finite = jnp.all(jnp.isfinite(found))
        usual = jnp.all(found <= _bound(state.recent, state.seen, sigmas))
        taken = finite & (usual | (state.seen + 1 < waits))
        entered = state.recent.at[:, state.seen % window].set(found)
        remembered = {
            "seen": jnp.where(finite, increment(state.seen), state.seen),
            "skipped": jnp.where(taken, state.skipped, increment(state.skipped)),
            "taken": taken,
            "recent": jnp.where(finite, entered, state.recent),
        }
        return (), remembered

    return from_stage(
        Stage(
            "skip_outliers",
            unchanged,
            scalars=scalars,
            start={
                "seen": lambda: jnp.zeros((), jnp.int32),
                "skipped": lambda: jnp.zeros((), jnp.int32),
                "taken": lambda: jnp.ones((), bool),
                "recent": lambda: jnp.zeros((len(names), window), jnp.float32),
            },
            state=SkipOutliersState,
            takes=("grads", *names),
        )
    )


def _is_real(x: Any) -> bool:
    return isinstance(x, int | float) or (
        hasattr(x, "dtype") and not jnp.issubdtype(x.dtype, jnp.complexfloating)
    )


def _bound(recent: jax.Array, seen: jax.Array, sigmas: chex.Numeric) -> jax.Array:
    """The most that is usual, for each row of recent values, of which the first may be unseen."""
    known = jnp.arange(recent.shape[1]) < seen
    number = jnp.minimum(seen, recent.shape[1]).astype(recent.dtype)
    mean = jnp.sum(recent, axis=1, where=known) / jnp.maximum(number, 1)
    apart = recent - mean[:, None]
    variance = jnp.sum(apart * apart, axis=1, where=known) / jnp.maximum(number - 1, 1)
    return mean + sigmas * jnp.sqrt(variance)
