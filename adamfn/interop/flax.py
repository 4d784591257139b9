# SPDX-License-Identifier: Apache-2.0
"""Flax's optimizer and train state, with `adamfn.step` inside: one pass over memory.

Both have the names, arguments and fields of flax's, so only the import changes. They take any
transformation, also of optax.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from flax import nnx
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from adamfn.chains.step import step
from adamfn.trees import PyTree, leaves_by_path

M = TypeVar("M")
# Flax 0.12.7 and later have the first, and call the second deprecated.
_pure: Any = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure


class Optimizer(nnx.Optimizer[M]):
    """`flax.nnx.Optimizer`, whose `update` takes `adamfn.step`.

    It is made, saved and sharded like flax's. Donate model and optimizer to the jitted function
    that calls `update`: the step then works in place.

    >>> import adamfn, jax.numpy as jnp
    >>> from adamfn.interop.flax import Optimizer
    >>> from flax import nnx
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> optimizer = Optimizer(model, adamfn.adamw(0.1), wrt=nnx.Param)
    >>> @nnx.jit(donate_argnums=(0, 1))
    ... def train_step(model, optimizer, x):
    ...     loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1) ** 2))(model)
    ...     optimizer.update(model, grads)
    ...     return loss
    >>> losses = [train_step(model, optimizer, jnp.ones((1, 2))) for _ in range(50)]
    >>> print(bool(losses[-1] < 0.01 * losses[0]))
    True
    """

    def update(
        self, model: M, grads: PyTree, /, *, return_updates: bool = False, **kwargs: Any
    ) -> Any:
        """Updates the parameters of `model` that are `wrt`, and the optimizer's state, in place.

        `grads` is the result of `nnx.grad`, for these parameters at least. Updates cost memory, and
        are returned with `return_updates` only. `kwargs` are extra arguments of `tx.update`, such
        as `learning_rate=`. The errors are those of `adamfn.step`.
        """
        if isinstance(model, nnx.State) and not isinstance(grads, nnx.State):
            raise TypeError(
                "Optimizer.update: found the gradients first; expected update(model, grads)."
            )
        # Only the newest versions of flax have `graph`.
        graph: dict[str, Any] = {"graph": self.graph} if hasattr(self, "graph") else {}
        params = _pure(nnx.state(model, self.wrt, **graph))
        chosen = _pure(nnx.state(grads, self.wrt, **graph))
        for path in sorted(leaves_by_path(params).keys() - leaves_by_path(chosen).keys()):
            raise ValueError(
                f"Optimizer.update: found no gradient of {path}; expected one of each parameter of"
                f" wrt={self.wrt!r}. In graph mode: nnx.grad(loss, argnums=nnx.DiffState(0, wrt))."
            )
        extra = _pure(kwargs) | {"return_updates": return_updates}
        state = _pure(self.opt_state)
        params, state, *updates = step(self.tx, chosen, state, params, **extra)
        nnx.update(model, params)
        nnx.update(self.opt_state, nnx.state(state, **graph))
        self.step[...] += 1
        return updates[0] if updates else None


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState`, whose `apply_gradients` takes `adamfn.step`.

    It is made by `create(apply_fn=, params=, tx=)`, subclassed, saved and sharded like flax's.

    >>> import adamfn, jax.numpy as jnp
    >>> from adamfn.interop.flax import TrainState
    >>> params = {"w": jnp.array([1.0, -2.0])}
    >>> state = TrainState.create(apply_fn=None, params=params, tx=adamfn.adam(0.1))
    >>> state = state.apply_gradients(grads=state.params)
    >>> print(state.step, state.params["w"].round(6))
    1 [ 0.9 -1.9]
    """

    def apply_gradients(self, *, grads: PyTree, **kwargs: Any) -> Any:
        """The state after a step.

        `grads` has the gradients of `params`. The collection of flax's fp8 layers, if there is one,
        replaces that of `params`. `kwargs` are fields of the train state to be replaced, and extra
        arguments of `tx.update`, such as `learning_rate=`. The errors are those of `adamfn.step`.
        """
        names = {field.name for field in fields(self)}
        extra = {name: kwargs.pop(name) for name in kwargs.keys() - names}
        overwrites = isinstance(grads, Mapping) and OVERWRITE_WITH_GRADIENT in grads
        trained = grads["params"] if overwrites else grads
        params = self.params["params"] if overwrites else self.params
        params, opt_state = step(self.tx, trained, self.opt_state, params, **extra)
        if overwrites:
            params = {"params": params, OVERWRITE_WITH_GRADIENT: grads[OVERWRITE_WITH_GRADIENT]}
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)
