"""Hyperparameters: numbers, scalar arrays and functions of the count, and their checks."""

import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np

from adamfn.trees import Numeric, describe, shown

Schedule: TypeAlias = Callable[[jax.Array], Numeric]
"""A function of the number of steps taken so far; any optax schedule is one."""

ScalarOrSchedule: TypeAlias = Numeric | Schedule
"""A number, a scalar array (traced or not), or a function of the count."""


def scalar(name: str, value: Any, *, below: float = math.inf, narrow: bool = False) -> Numeric:
    """Checks a hyperparameter that must be a number in `[0, below)`, or a scalar array.

    A number becomes a Python float, so that what is derived from it is derived in double precision.
    An array is never fetched: only its shape and dtype are checked, float32 at least unless
    `narrow`. Raises TypeError, or ValueError for a number out of range or NaN.
    """
    value = _unboxed(value)
    if isinstance(value, jax.Array):
        return _scalar_array(name, value, narrow)
    if isinstance(value, np.ndarray | np.generic) and jnp.issubdtype(value.dtype, jnp.floating):
        value = float(value) if value.ndim == 0 else value  # bfloat16 is no Real
    elif isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        hint = " optax.inject_hyperparams makes one of a schedule." if callable(value) else ""
        if len(jax.tree.leaves(value)) > 1:
            hint = " Parameters are for init: state = tx.init(params)."
        raise TypeError(f"{name} is {shown(value)}; expected a number or a scalar array.{hint}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not 0 <= number < below:  # false for NaN too
        bound = "finite" if below == math.inf else f"less than {below:g}"
        raise ValueError(f"{name} is {number}; expected a number at least 0 and {bound}.")
    return number


def scheduled(name: str, value: Any) -> ScalarOrSchedule:
    """Checks a hyperparameter as `scalar`, of any width; it may also be a function of the count."""
    value = _unboxed(value)
    if not callable(value):
        return scalar(name, value, narrow=True)
    try:
        inspect.signature(value).bind(0)
    except TypeError as error:
        raise TypeError(
            f"{name} is {shown(value)}, which cannot be called with the count alone ({error});"
            " expected a number or a function of the count, such as"
            " optax.cosine_decay_schedule(1e-3, 1000), not the factory."
        ) from None
    except ValueError:  # a function in C may not say what it takes
        pass
    return cast("Schedule", value)


def value_at(name: str, value: ScalarOrSchedule, count: jax.Array) -> Numeric:
    """The value of a hyperparameter from `scheduled` after `count` steps, checked as `scalar`."""
    if not callable(value):
        return value
    result = value(count)
    try:
        return scalar(name, result, narrow=True)
    except TypeError:
        raise TypeError(
            f"{name}: its schedule returned {describe(result)}; expected a number or a real scalar"
            " array."
        ) from None


def check_seed(seed: Any) -> None:
    """Raises ValueError unless a seed is None, an integer in [0, 2^32), or an array of one."""
    is_array, kind = isinstance(seed, jax.Array), getattr(seed, "dtype", type(seed))
    is_integer = np.shape(seed) == () and jnp.issubdtype(kind, jnp.integer)
    if seed is not None and not (is_integer and (is_array or 0 <= seed < 2**32)):
        raise ValueError(
            f"seed is {shown(seed)}; expected an integer in [0, 2^32), or an array of one."
        )


def _unboxed(value: Any) -> Any:
    """A variable of Keras or flax, which can be called too, as the array that it holds now."""
    return jnp.asarray(value) if hasattr(type(value), "__jax_array__") else value


def _scalar_array(name: str, value: jax.Array, narrow: bool) -> jax.Array:
    if value.shape != ():
        raise TypeError(
            f"{name} is an array of shape {value.shape}; expected a scalar. For several values at"
            " once, jax.vmap over init and update, or give each group of leaves its own with"
            " optax.partition."
        )
    if jnp.issubdtype(value.dtype, jnp.integer):
        return value.astype(jnp.float32)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name} is an array of {value.dtype}; expected a real number.")
    if not narrow and jnp.finfo(value.dtype).bits < 32:
        raise TypeError(
            f"{name} is an array of {value.dtype}, which cannot hold it (in bfloat16, 0.999 is 1);"
            " expected float32. With optax.inject_hyperparams, pass hyperparam_dtype=jnp.float32."
        )
    return value
