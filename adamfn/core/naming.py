"""Errors that translate the names that other libraries give to arguments."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from adamfn.trees import shown

_P = ParamSpec("_P")
_R = TypeVar("_R")

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
