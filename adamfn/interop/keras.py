# SPDX-License-Identifier: Apache-2.0
"""Any transformation as an optimizer of Keras 3, on its JAX backend."""
# pyright: reportAttributeAccessIssue=false, reportUntypedBaseClass=false

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import keras
from jax.sharding import NamedSharding

from adamfn.chains.step import check_extra, step
from adamfn.chains.transform import Transformation, check_transformation
from adamfn.trees import PyTree

if keras.backend.backend() != "jax":
    raise ImportError(
        f"adamfn.interop.keras: Keras runs on {keras.backend.backend()}; expected jax. Set the"
        " environment variable KERAS_BACKEND=jax before keras is imported."
    )


class Optimizer(keras.optimizers.Optimizer):
    """A transformation, ours or optax's, as an optimizer for `compile` and `fit`.

    The parameters are an `OrderedDict` by their paths in Keras, such as `dense/kernel`, for masks
    and the like. A model in bfloat16 trains as in float32, if the chain ends in `round_weights`.

    To load a compiled model that was saved, use a subclass that Keras can find, as below. The state
    is saved with the model, to the bit.

    Args:
      tx: the transformation.
      learning_rate: a number or Keras's schedule, in place of the transformation's rate, which must
        take one; callbacks can then change it. None: the transformation's.
      **kwargs: Keras's: `gradient_accumulation_steps` (sums are in the weights' dtype), `clipnorm`,
        `use_ema` and others, but no `weight_decay`, which belongs into the transformation.

    Raises:
      TypeError, ValueError: not a transformation, or one that takes no rate; a weight decay; at a
        step, what `adamfn.step` raises, or gradients of only some of the variables.

    >>> import adamfn, keras, numpy as np
    >>> from adamfn.interop.keras import Optimizer
    >>> @keras.saving.register_keras_serializable()
    ... class Adam24(Optimizer):
    ...     def __init__(self, learning_rate=0.1, **kwargs):
    ...         tx = adamfn.chain(adamfn.adam(), adamfn.round_weights(24))
    ...         super().__init__(tx, learning_rate, **kwargs)
    >>> model = keras.Sequential([keras.layers.Dense(1, dtype="bfloat16")])
    >>> model.compile(optimizer=Adam24(), loss="mse")
    >>> x = np.ones((8, 2))
    >>> losses = model.fit(x, x[:, :1], epochs=50, verbose=0).history["loss"]
    >>> print(losses[-1] < 0.01 * losses[0])
    True
    """

    def __init__(
        self,
        tx: Transformation,
        learning_rate: Any = None,
        *,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_transformation("Optimizer: tx", tx)
        if kwargs.get("weight_decay") is not None:
            raise ValueError(
                f"Optimizer: weight_decay is {kwargs['weight_decay']!r}; expected none. Put it into"
                " the transformation, such as adamfn.adamw(weight_decay=...)."
            )
        if learning_rate is None:
            learning_rate = _OwnRate()
        else:
            check_extra(tx, {"learning_rate": learning_rate}, "Optimizer")
        super().__init__(learning_rate, name=name, **kwargs)
        self.tx = tx

    def build(self, variables: Sequence[Any]) -> None:
        """Makes the state; Keras calls this."""
        if self.built:
            return
        super().build(variables)
        state = self.tx.init(self._by_path([v.value for v in self._moved]))
        leaves, self._structure = jax.tree.flatten(state)
        self._state: list[Any] = []
        for k, leaf in enumerate(leaves):
            layout = leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None
            variable = self.add_variable(
                leaf.shape, dtype=leaf.dtype.name, layout=layout, name=f"state_{k}"
            )
            variable.assign(leaf)
            self._state.append(variable)

    @property
    def _moved(self) -> list[Any]:
        """The variables that it moves. As an attribute, Keras would take them for its state."""
        overwritten = self._overwrite_variable_with_gradient  # the scales of fp8 layers
        return [v for v in self._trainable_variables if not overwritten(v)]

    def _by_path(self, values: Sequence[Any]) -> PyTree:
        tree = OrderedDict(zip((v.path for v in self._moved), values, strict=True))
        if len(tree) < len(values):
            paths = ", ".join(v.path for v in self._moved)
            raise ValueError(
                f"Optimizer: found variables {paths}; expected a path for each. Give each layer a"
                " name of its own."
            )
        return tree

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        given = {id(v): grad for v, grad in zip(trainable_variables, grads, strict=True)}
        for variable in self._moved:
            if id(variable) not in given:
                raise ValueError(
                    f"Optimizer: found no gradient of {variable.path}; expected one of each"
                    " variable that it was built for. Set trainable = False on frozen layers."
                )
        rate: dict[str, Any] = {}
        if not isinstance(self._learning_rate, _OwnRate):
            rate["learning_rate"] = keras.ops.convert_to_tensor(learning_rate, "float32")
        state = jax.tree.unflatten(self._structure, [v.value for v in self._state])
        params = self._by_path([v.value for v in self._moved])
        chosen = self._by_path([given[id(v)] for v in self._moved])
        params, state = step(self.tx, chosen, state, params, **rate)
        new = [*params.values(), *jax.tree.leaves(state)]
        for variable, value in zip([*self._moved, *self._state], new, strict=True):
            variable.assign(value)

    def get_config(self) -> dict[str, Any]:
        """Keras's settings, without the transformation and its rate."""
        config = super().get_config()
        own = {"learning_rate"} if isinstance(self._learning_rate, _OwnRate) else set[str]()
        return {key: config[key] for key in config.keys() - own - {"weight_decay"}}


class _OwnRate(keras.optimizers.schedules.LearningRateSchedule):
    """The rate of the transformation, which Keras neither knows nor sets."""

    def __call__(self, step: Any) -> float:
        return math.nan

    def get_config(self) -> dict[str, Any]:
        return {}
