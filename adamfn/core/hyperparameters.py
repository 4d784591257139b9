# SPDX-License-Identifier: Apache-2.0
"""Hyperparameters: numbers, scalar arrays and functions of the count, and their checks."""

import functools
import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import Any, ParamSpec, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from adamfn.trees import Numeric, described, shown

_P = ParamSpec("_P")
_R = TypeVar("_R")

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
    if isinstance(value, np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()  # bfloat16 is no Real
    if isinstance(value, bool) or not isinstance(value, Real):
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
            f"{name}: its schedule returned {described(result)}; expected a number or a real scalar"
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


_WAYS_OUT = {
    "mu_dtype": "how the moments are stored is moments=, such as moments='bfloat16'",
    "nesterov": "adam(nesterov=...) is Adam with and without it",
    "lr": "the rate is learning_rate=",
    **dict.fromkeys(("betas", "beta1", "beta2"), "the decays are b1= and b2="),
    "epsilon": "it is eps=",
    "weight_decay": "decoupled decay is adamw(weight_decay=...), and an L2 penalty is"
    " chain(add_decayed_weights(...), adam(...))",
    "amsgrad": "it is a recipe of its own, amsgrad(...)",
    "maximize": "negate the loss, or chain optax.scale(-1.0) before it",
    "bias_correction": "without it the chain is chain(scale_by_moments(...), scale_by_lr(...))",
}


def explained(recipe: Callable[_P, _R]) -> Callable[_P, _R]:
    """The recipe, with a TypeError for unknown arguments that says what to write instead."""
    name, spec = recipe.__name__, inspect.getfullargspec(recipe)
    known = [*spec.args, *spec.kwonlyargs]

    @functools.wraps(recipe)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if len(args) > (most := len(spec.args)):
            raise TypeError(
                f"{name}: found {len(args)} positional arguments, and {shown(args[most])} as the"
                f" {most + 1}th; expected at most {most}: {', '.join(spec.args)}. Give all others"
                " by name."
            )
        for key in [key for key in kwargs if key not in known]:
            way_out = _WAYS_OUT.get(key, f"it takes {', '.join(known)}")
            raise TypeError(f"{name}: found the argument {key}={shown(kwargs[key])}; {way_out}.")
        return recipe(*args, **kwargs)

    return checked
