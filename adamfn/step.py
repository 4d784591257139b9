"""`step`: one training update, from gradients to the next parameters."""

from typing import Any, Protocol, cast

from adamfn.transform import GradientTransformation, Transformation, apply_updates
from adamfn.trees import PyTree


class StepFunction(Protocol):
    """The type of `SteppingTransformation.step`."""

    def __call__(
        self, grads: PyTree, state: PyTree, params: PyTree, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        """Returns the next parameters and the next state."""
        ...


class SteppingTransformation(GradientTransformation):
    """A `GradientTransformation` that also knows a shorter way to the next parameters.

    It is the pair `(init, update)` wherever a pair is wanted, and its `step` does what `update` and
    `apply_updates` do, in one pass.
    """

    step: StepFunction

    def __new__(cls, init: Any, update: Any, step: StepFunction) -> "SteppingTransformation":
        """Makes the pair, and keeps `step` beside it."""
        pair = super().__new__(cls, init, update)
        pair.step = step
        return pair


def step(
    tx: Transformation, grads: PyTree, state: PyTree, params: PyTree, **extra: Any
) -> tuple[PyTree, PyTree]:
    """One training update: the transformation's own `step`, or its `update` and `apply_updates`.

    Args:
      tx: any transformation, ours or optax's. `adamfn.fused_adam` and `fused_adamw` have a step of
        their own, which goes over the memory once.
      grads: the gradients.
      state: the transformation's state. Donate it and the parameters to the jitted function that
        this is called in, and return them in the order in which that function takes them: they
        are then written in place. (JAX pairs donated arrays of one shape with results by order;
        `(state, params)` against `(params, state)` costs a copy of each.)
      params: the parameters.
      **extra: what `update` takes besides, such as `learning_rate=`.

    Returns:
      The next parameters and the next state.

    Raises:
      TypeError, ValueError: as `tx.update` and `apply_updates`.

    >>> from functools import partial
    >>> import adamfn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> tx = adamfn.fused_adam(0.1)
    >>> params = {"w": jnp.array([1.0, -2.0])}
    >>> state = tx.init(params)
    >>> @partial(jax.jit, donate_argnums=(0, 1))
    ... def train_step(params, state):
    ...     grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
    ...     return adamfn.step(tx, grads, state, params)
    >>> params, state = train_step(params, state)
    >>> print(params["w"])
    [ 0.9 -1.9]
    """
    own = getattr(tx, "step", None)
    if callable(own):
        return cast("StepFunction", own)(grads, state, params, **extra)
    if not callable(getattr(tx, "update", None)):
        raise TypeError(
            f"step: the first argument is {tx!r}; expected a transformation with `init` and"
            " `update`. Call the factory first: adamfn.adam(), not adamfn.adam."
        )
    updates, state = tx.update(grads, state, params, **extra)
    return apply_updates(params, updates), state
