"""Torch's optimizers and their namesakes here, and which of them a state dict is of."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import adamfn
from adamfn.chains.transform import GradientTransformation
from adamfn.interop.torch.parameters import TorchParameter
from adamfn.interop.torch.quantized import is_quantized
from adamfn.interop.torch.settings import decoupled_in
from adamfn.stages.moments import (
    ScaleByInfinityMomentsState,
    ScaleByMaxMomentsState,
    ScaleByMomentsState,
)
from adamfn.stages.variants import ScaleByNesterovMomentsState


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
    group, possible = parameter.group, possible_classes(parameter)
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
            " optimizer='AdamW' (which apex and DeepSpeed are by default, with adam_w_mode)."
        )
    name = optimizer or next(iter(possible))
    if name in ("Adam", "AdamW"):
        name = "AMSGrad" if group.get("amsgrad") else "Adam"
    return _MEMBERS[name]


def possible_classes(parameter: TorchParameter) -> tuple[str, ...]:
    """The classes that write such a group and state."""
    group, state = parameter.group, parameter.state
    if not {"betas", "eps"} <= set(group):
        return ()
    decoupled = decoupled_in(group)
    if "momentum_decay" in group:
        return ("NAdam",)
    if is_quantized(parameter) or "correct_bias" in group:  # bitsandbytes', transformers'
        return ("AdamW",)
    if "caution" in group and decoupled is None:  # timm's
        return ("AdamW",) if "amsgrad" in group else ()
    if "amsgrad" in group or "bias_correction" in group:  # apex's and DeepSpeed's have the second
        return ("Adam", "AdamW") if decoupled is None else ("AdamW",) if decoupled else ("Adam",)
    if decoupled is not None:
        return ("RAdam",)
    if "weight_decay" not in group and "maximize" in group:
        return ("SparseAdam",)
    if "exp_inf" in state or (not state and "foreach" in group):
        return ("Adamax",)
    return ()
