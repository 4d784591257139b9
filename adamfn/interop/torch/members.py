"""Torch's optimizers and their namesakes here: what each keeps, and the chain that goes on."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

import adamfn
from adamfn.chaining import from_stage
from adamfn.hyperparams import ScalarOrSchedule
from adamfn.interop.torch.parameters import TorchParameter, number_of
from adamfn.stage import Stage
from adamfn.stages.infinity import ScaleByInfinityMomentsState
from adamfn.stages.maximum import ScaleByMaxMomentsState
from adamfn.stages.nesterov import ScaleByNesterovMomentsState
from adamfn.stages.two_moments import ScaleByMomentsState
from adamfn.transform import GradientTransformation, Transformation


class Member(NamedTuple):
    """An optimizer of torch and the stage that does the same."""

    optimizer: str
    """The name of torch's class."""
    stage: Callable[..., GradientTransformation]
    state: type[Any]
    """The state of that stage."""
    keys: Mapping[str, str]
    """torch's key for each of the state's trees."""
    scalars: tuple[str, ...] = ("step",)
    """What torch keeps of a parameter besides, by its key."""
    hyperparameters: tuple[str, ...] = ()
    """What the stage takes besides b1, b2 and eps."""
    corrects: tuple[int, int] = (1, 1)
    """Whether b1 and b2 are corrected for in `bias_correct`."""


_PAIR = {"mu": "exp_avg", "nu": "exp_avg_sq"}
_TRIPLE = _PAIR | {"nu_max": "max_exp_avg_sq"}

_MEMBERS = {
    "Adam": Member("Adam", adamfn.scale_by_moments, ScaleByMomentsState, _PAIR),
    "AMSGrad": Member("Adam", adamfn.scale_by_max_moments, ScaleByMaxMomentsState, _TRIPLE),
    "NAdam": Member(
        "NAdam",
        adamfn.scale_by_nesterov_moments,
        ScaleByNesterovMomentsState,
        _PAIR,
        scalars=("step", "mu_product"),
        hyperparameters=("momentum_decay",),
        corrects=(0, 1),
    ),
    "RAdam": Member("RAdam", adamfn.scale_by_rectified_moments, ScaleByMomentsState, _PAIR),
    "Adamax": Member(
        "Adamax",
        adamfn.scale_by_infinity_moments,
        ScaleByInfinityMomentsState,
        {"mu": "exp_avg", "nu": "exp_inf"},
        corrects=(1, 0),
    ),
    "SparseAdam": Member("SparseAdam", adamfn.scale_by_lazy_moments, ScaleByMomentsState, _PAIR),
}
_OPTIMIZERS = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "SparseAdam")


def member_of(caller: str, parameter: TorchParameter, optimizer: str | None) -> Member:
    """The member of the family that a parameter's group and state are of.

    Args:
      caller: the function that error messages speak for.
      parameter: the parameter.
      optimizer: the name of torch's class where the user gave it.

    Raises:
      ValueError: they are of none, or do not tell of which, or of another than `optimizer`.
    """
    if optimizer is not None and optimizer not in _OPTIMIZERS:
        raise ValueError(
            f"{caller}: optimizer is {optimizer!r}; expected one of {', '.join(_OPTIMIZERS)}."
        )
    group, possible = parameter.group, _possible(parameter)
    if optimizer and possible and optimizer not in possible:
        raise ValueError(
            f"{caller}: optimizer is {optimizer!r}, and the group of {parameter} is that of"
            f" {' or '.join(possible)}. Leave optimizer= out, or pass the state_dict() that is"
            " meant."
        )
    if not (optimizer or possible):
        kept = ", ".join(map(str, parameter.state)) or "nothing"
        raise ValueError(
            f"{caller}: the group of {parameter} has the hyperparameters {', '.join(group)}, its"
            f" state {kept}; expected one of {', '.join(_OPTIMIZERS)}. Another optimizer's run"
            " cannot be taken over; optimizer= names the class of an older torch's."
        )
    if not optimizer and len(possible) > 1 and group.get("weight_decay"):
        raise ValueError(
            f"{caller}: {parameter} has a weight decay of {group['weight_decay']}, and its group"
            " does not tell Adam from AdamW, as in torch before 2.7. Pass optimizer='Adam' or"
            " optimizer='AdamW'."
        )
    name = optimizer or next(iter(possible))
    if name in ("Adam", "AdamW"):
        name = "AMSGrad" if group.get("amsgrad") else "Adam"
    return _MEMBERS[name]


def _possible(parameter: TorchParameter) -> tuple[str, ...]:
    """The classes that write such a group and state."""
    group, state = parameter.group, parameter.state
    if not {"betas", "eps"} <= set(group):
        return ()
    decoupled = group.get("decoupled_weight_decay")
    if "momentum_decay" in group:
        return ("NAdam",)
    if "amsgrad" in group:
        return ("Adam", "AdamW") if decoupled is None else ("AdamW",) if decoupled else ("Adam",)
    if decoupled is not None:
        return ("RAdam",)
    if "weight_decay" not in group and "maximize" in group:
        return ("SparseAdam",)
    if "exp_inf" in state or (not state and "foreach" in group):
        return ("Adamax",)
    return ()


def continue_with(
    caller: str,
    member: Member,
    parameter: TorchParameter,
    optimizer: str | None,
    learning_rate: ScalarOrSchedule | None,
) -> GradientTransformation:
    """The chain that does what torch does with the hyperparameters of a parameter's group.

    Args:
      caller: the function that error messages speak for.
      member: the member of the family.
      parameter: the parameter.
      optimizer: the name of torch's class where the user gave it.
      learning_rate: in place of the group's.
    """
    group = parameter.group

    def number(key: str, value: Any) -> float:
        return number_of(caller, f"{key} in the group of {parameter}", value)

    absent = [key for key in ("lr", "betas", "eps", *member.hyperparameters) if key not in group]
    if absent:
        raise ValueError(
            f"{caller}: the group of {parameter} has no {absent[0]}; found {', '.join(group)}."
            " Pass the state_dict() of the optimizer itself."
        )
    try:
        b1, b2 = (number("betas", b) for b in group["betas"])
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{caller}: betas in the group of {parameter} is {group['betas']!r}; expected two"
            " numbers."
        ) from error
    more = {key: number(key, group[key]) for key in member.hyperparameters}
    decay = number("weight_decay", group.get("weight_decay", 0.0))
    decoupled = group.get("decoupled_weight_decay", optimizer == "AdamW")

    rate = number("lr", group["lr"]) if learning_rate is None else learning_rate
    try:
        stages: list[Transformation] = [
            member.stage(b1, b2, number("eps", group["eps"]), **more),
            adamfn.bias_correct(b1 * member.corrects[0], b2 * member.corrects[1]),
            adamfn.scale_by_lr(rate),
        ]
        if decay:
            place = 2 if decoupled else 0
            stages.insert(place, adamfn.add_decayed_weights(decay))
    except ValueError as error:
        raise ValueError(f"{caller}: the group of {parameter}: {error}") from error
    if group.get("maximize"):
        stages.insert(0, _MAXIMIZE)
    return adamfn.chain(*stages)


_MAXIMIZE = from_stage(Stage("maximize", jnp.negative))
