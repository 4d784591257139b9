"""Which member of the family a torch parameter's group is of, and what its settings mean."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import adamfn
from adamfn.chains.transform import GradientTransformation
from adamfn.interop.torch.parameters import TorchParameter
from adamfn.interop.torch.quantized import is_quantized
from adamfn.stages.infinity import ScaleByInfinityMomentsState
from adamfn.stages.maximum import ScaleByMaxMomentsState
from adamfn.stages.nesterov import ScaleByNesterovMomentsState
from adamfn.stages.two_moments import ScaleByMomentsState


class Member(NamedTuple):
    """An optimizer of torch and the stage that does the same."""

    optimizer: str
    """The name of torch's class."""
    stage: Callable[..., GradientTransformation]
    state: type[Any]
    """The state of that stage."""
    keys: Mapping[str, str]
    """torch's key for each field of the state that holds moments."""
    scalars: tuple[str, ...] = ("step",)
    """torch's keys for the numbers that it keeps of each parameter."""
    hyperparameters: tuple[str, ...] = ()
    """What the stage takes besides b1, b2 and eps."""
    corrects: tuple[int, int] = (1, 1)
    """Whether `bias_correct` corrects for b1 and for b2."""


_PAIR = {"mu": "exp_avg", "nu": "exp_avg_sq"}
_MEMBERS = {
    "Adam": Member("Adam", adamfn.scale_by_moments, ScaleByMomentsState, _PAIR),
    "AMSGrad": Member(
        "Adam",
        adamfn.scale_by_max_moments,
        ScaleByMaxMomentsState,
        _PAIR | {"nu_max": "max_exp_avg_sq"},
    ),
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

_KNOWN = {
    *("params", "param_names", "lr", "betas", "eps", "weight_decay", "step"),
    *("amsgrad", "maximize", "momentum_decay", "decoupled_weight_decay"),
    *("correct_bias", "bias_correction", "adam_w_mode", "caution"),  # of look-alikes
    *("foreach", "fused", "capturable", "differentiable"),  # how torch computes it
    *("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"),  # schedulers'
    *("name", "group_name", "lr_scale", "max_lr_snapshot"),  # timm's; lr has the scale in it
}
_ONLY_AS: dict[str, Any] = {
    "corrected_weight_decay": False,
    "clipping_threshold": None,
    "alpha": 0.0,
    "t_alpha": None,
    "t_beta3": None,
}
"""Settings of timm and bitsandbytes that change the updates, unless they have this value."""


def member_of(parameter: TorchParameter, optimizer: str | None) -> Member:
    """The member of the family that a parameter's group and state are of."""
    if optimizer is not None and optimizer not in _OPTIMIZERS:
        raise ValueError(
            f"interop.torch: optimizer is {optimizer!r}; expected one of {', '.join(_OPTIMIZERS)}."
        )
    group, possible = parameter.group, possible_classes(parameter)
    if optimizer and possible and optimizer not in possible:
        raise ValueError(
            f"interop.torch: optimizer is {optimizer!r}, and the group of {parameter} is that of"
            f" {' or '.join(possible)}. Leave optimizer= out, or pass the state_dict() that is"
            " meant."
        )
    if not (optimizer or possible):
        kept = ", ".join(map(str, parameter.state)) or "nothing"
        raise ValueError(
            f"interop.torch: the group of {parameter} has the hyperparameters {', '.join(group)},"
            f" its state {kept}; expected one of {', '.join(_OPTIMIZERS)}. Another optimizer's run"
            " cannot be taken over; optimizer= names the class of an older torch's."
        )
    if not optimizer and len(possible) > 1 and group.get("weight_decay"):
        raise ValueError(
            f"interop.torch: {parameter} has a weight decay of {group['weight_decay']}, and its"
            " group does not tell Adam from AdamW, as in torch before 2.7. Pass optimizer='Adam' or"
            " optimizer='AdamW' (the default of apex and DeepSpeed, with adam_w_mode)."
        )
    name = optimizer or next(iter(possible))
    if name in ("Adam", "AdamW"):
        name = "AMSGrad" if group.get("amsgrad") else "Adam"
    return _MEMBERS[name]


def possible_classes(parameter: TorchParameter) -> tuple[str, ...]:
    """The classes that write such a group and state."""
    group, state, decoupled = parameter.group, parameter.state, decoupled_in(parameter.group)
    if not {"betas", "eps"} <= {*group}:
        return ()
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
    return ("Adamax",) if "exp_inf" in state or (not state and "foreach" in group) else ()


def decoupled_in(group: Mapping[str, Any]) -> bool | None:
    """Whether a group's weight decay is decoupled; None if it does not tell."""
    decoupled = group.get("decoupled_weight_decay", group.get("adam_w_mode"))
    return None if decoupled is None else bool(decoupled)


def check_settings(parameter: TorchParameter, harmless: Collection[str]) -> None:
    """Checks that no setting of a group is ignored, except `harmless` ones."""
    group = parameter.group
    for key in group.keys() - _KNOWN - {*harmless}:
        has = f"interop.torch: the group of {parameter} has {key}={group[key]!r}"
        if key not in _ONLY_AS:
            raise ValueError(
                f"{has}, which is not known; expected hyperparameters of torch.optim, transformers,"
                " apex, DeepSpeed, timm or bitsandbytes. If it changes no update, pass"
                f" harmless=[{key!r}]."
            )
        if group[key] != _ONLY_AS[key] or group[key] is True:
            raise ValueError(
                f"{has}, which no chain here does; expected {_ONLY_AS[key]!r}. To go on without it,"
                f" pass harmless=[{key!r}]."
            )
    fused = [key for key in ("bias_correction", "correct_bias") if key in group]
    wrong = ""
    if group.get("amsgrad") and fused:
        wrong = f"amsgrad beside {fused[0]}"
    elif group.get("caution") and decoupled_in(group) is False:
        wrong = "caution and a decay that is not decoupled"
    if wrong:
        raise ValueError(
            f"interop.torch: the group of {parameter} has {wrong}; no known optimizer does both."
            " Pass the state_dict() of the optimizer itself (DeepSpeed's ignores amsgrad: set it to"
            " False)."
        )
