# SPDX-License-Identifier: Apache-2.0
"""Which member of the family a torch parameter's group is of, and the chain that continues it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamfn.chains.chain import chain, from_stage
from adamfn.chains.transform import GradientTransformation, Transformation
from adamfn.core.averages import Averages
from adamfn.core.formulas import ratio
from adamfn.core.hyperparameters import ScalarOrSchedule, scheduled
from adamfn.core.stage import Scalars, Stage
from adamfn.interop.torch.parameters import TorchParameter, check, number_of
from adamfn.stages import moments, variants
from adamfn.stages.rates import add_decayed_weights, rate_at, scale_by_lr
from adamfn.stages.statistics import cautious_updates
from adamfn.trees import Numeric, shown


class Member(NamedTuple):
    """An optimizer of torch and the stage that does the same."""

    optimizer: str
    """The name of torch's class."""
    stage: Callable[..., GradientTransformation]
    keys: Mapping[str, str] = {"mu": "exp_avg", "nu": "exp_avg_sq"}
    """torch's key for each field of the stage's state that holds moments."""
    corrects: tuple[int, int] = (1, 1)
    """Whether `bias_correct` corrects for b1 and for b2."""
    decoupled: bool = False
    """Whether the weight decay is decoupled."""


_MAX = {"mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"}
_INFINITY = {"mu": "exp_avg", "nu": "exp_inf"}
_MEMBERS = {
    "Adam": Member("Adam", moments.scale_by_moments),
    "AdamW": Member("AdamW", moments.scale_by_moments),
    "AMSGrad": Member("Adam", moments.scale_by_max_moments, _MAX),
    "NAdam": Member("NAdam", variants.scale_by_nesterov_moments, corrects=(0, 1)),
    "RAdam": Member("RAdam", variants.scale_by_rectified_moments),
    "Adamax": Member("Adamax", moments.scale_by_infinity_moments, _INFINITY, corrects=(1, 0)),
    "SparseAdam": Member("SparseAdam", variants.scale_by_lazy_moments),
}
_MAXIMIZE = from_stage(Stage("maximize", jnp.negative))
_OPTIMIZERS = [name for name in _MEMBERS if name != "AMSGrad"]

_WRITTEN_BY: dict[str, tuple[str, ...]] = {
    "momentum_decay": ("NAdam",),
    "correct_bias": ("AdamW",),  # of transformers
    "t_beta3": ("AdamW",),  # of bitsandbytes, as the next
    "state1": ("AdamW",),
    "amsgrad": ("Adam", "AdamW"),
    "bias_correction": ("Adam", "AdamW"),  # of apex and DeepSpeed
    "caution": (),  # timm's NAdamW
    "decoupled_weight_decay": ("RAdam",),
    "exp_inf": ("Adamax",),
}
"""The classes that write a key; the first key that a group or a state has tells."""

_KNOWN = {
    *("params", "param_names", "lr", "betas", "eps", "weight_decay", "step"),
    *("amsgrad", "maximize", "momentum_decay", "decoupled_weight_decay"),
    *("correct_bias", "bias_correction", "adam_w_mode", "caution"),  # of look-alikes
    *("foreach", "fused", "capturable", "differentiable"),  # how torch computes it
    *("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"),  # schedulers'
    *("name", "group_name", "lr_scale", "max_lr_snapshot"),  # timm's; lr has the scale in it
}
_ONLY_AS: dict[str, Any] = {
    **{"corrected_weight_decay": False, "clipping_threshold": None},
    **{"alpha": 0.0, "t_alpha": None, "t_beta3": None},
}
"""Settings of timm and bitsandbytes that change the updates, unless they have this value."""


def member_of(parameter: TorchParameter, optimizer: str | None) -> Member:
    """The member of the family that a parameter's group and state are of."""
    group, state = parameter.group, parameter.state
    timm = True if "caution" in group else None
    decoupled = group.get("decoupled_weight_decay", group.get("adam_w_mode", timm))
    written_by = [names for key, names in _WRITTEN_BY.items() if key in group or key in state]
    if "maximize" in group and "weight_decay" not in group:
        written_by.append(("SparseAdam",))
    if "foreach" in group and not state:
        written_by.append(("Adamax",))
    classes = next(iter(written_by if {"betas", "eps"} <= {*group} else ()), ())
    if len(classes) > 1 and decoupled is not None:
        classes = (classes[bool(decoupled)],)
    expected = classes or _OPTIMIZERS
    if optimizer not in expected if optimizer is not None else not classes:
        raise ValueError(
            f"interop.torch: optimizer is {shown(optimizer)}, the group of {parameter} has the"
            f" hyperparameters {', '.join(group)}, its state"
            f" {', '.join(map(str, state)) or 'nothing'}; expected one of {', '.join(expected)}."
            " Another optimizer's run cannot be taken over; optimizer= is for older state dicts,"
            " which do not tell their class."
        )
    if optimizer is None and len(classes) > 1 and group.get("weight_decay"):
        raise ValueError(
            f"interop.torch: the group of {parameter} has a weight decay, and does not tell Adam"
            " from AdamW, as in torch before 2.7. Pass optimizer='Adam' or optimizer='AdamW' (the"
            " default of apex and DeepSpeed, with adam_w_mode)."
        )
    name = optimizer or next(iter(classes))
    member = _MEMBERS["AMSGrad" if group.get("amsgrad") else name]
    return member._replace(decoupled=name == "AdamW" if decoupled is None else bool(decoupled))


def check_settings(parameter: TorchParameter, member: Member) -> None:
    """Checks that no setting of a group is ignored."""
    group = parameter.group
    unknown = "which is not known; expected a setting of torch.optim or a look-alike"
    wrong = dict.fromkeys(group.keys() - _KNOWN - _ONLY_AS.keys(), unknown)
    for key, value in _ONLY_AS.items():
        if group.get(key, value) != value:
            wrong[key] = f"which no chain here does; expected {value!r}"
    if group.get("amsgrad") and {"bias_correction", "correct_bias"} & {*group}:
        wrong["amsgrad"] = "which no known optimizer does beside bias_correction or correct_bias"
    if group.get("caution") and not member.decoupled:
        wrong["caution"] = "which no known optimizer does beside a decay that is not decoupled"
    for key, problem in wrong.items():
        raise ValueError(
            f"interop.torch: the group of {parameter} has {key}={shown(group[key])}, {problem}. To"
            f" go on without it, pass harmless=[{key!r}]."
        )


def continue_with(
    member: Member, parameter: TorchParameter, learning_rate: ScalarOrSchedule | None
) -> GradientTransformation:
    """The chain that does what torch does with the hyperparameters of a parameter's group."""
    group, of = parameter.group, f"in the group of {parameter}"
    lr, eps = (parameter.number("group", key) for key in ("lr", "eps"))
    own = ["momentum_decay"] if member.optimizer == "NAdam" else []
    arguments = {key: parameter.number("group", key) for key in own}
    betas: Any = parameter.entry("group", "betas")
    fits = isinstance(betas, Sequence) and len(betas) == 2
    check(fits, f"betas {of} is {shown(betas)}", "two numbers.")
    b1, b2 = (number_of(f"betas {of}", b) for b in betas)
    weight_decay = number_of(f"weight_decay {of}", group.get("weight_decay", 0.0))
    rate = lr if learning_rate is None else learning_rate
    corrects = bool(group.get("correct_bias", group.get("bias_correction", True)))
    last = "correct_bias" in group  # transformers' AdamW decays the parameter that has moved
    try:
        stage = _with_uncorrected_eps if last or not corrects else member.stage
        stages: list[Transformation] = [stage(b1, b2, eps, **arguments)]
        if group.get("caution"):
            stages.append(cautious_updates())
        if corrects:
            stages.append(moments.bias_correct(b1 * member.corrects[0], b2 * member.corrects[1]))
        if weight_decay and not last:
            place = len(stages) if member.decoupled else 0
            stages.insert(place, add_decayed_weights(weight_decay))
        stages.append(scale_by_lr(rate))
        if weight_decay and last:
            stages.append(_decay_last(weight_decay, rate))
    except ValueError as error:
        raise ValueError(f"interop.torch: the group of {parameter}: {error}") from error
    return chain(*([_MAXIMIZE] if group.get("maximize") else []), *stages)


def _with_uncorrected_eps(b1: float, b2: float, eps: float) -> GradientTransformation:
    """`scale_by_moments`, but u = m / (sqrt(v) + eps): eps is in units of the uncorrected root."""
    at = Averages.of(b1, b2, eps)
    return moments.from_moments("scale_by_moments", ratio, "float32", lambda *_: ((at, None), {}))


def _decay_last(weight_decay: float, learning_rate: ScalarOrSchedule) -> GradientTransformation:
    """The decay of a parameter that has moved: u - rate weight_decay (p + u)."""
    configured = scheduled("learning_rate", learning_rate)

    def scalars(count: jax.Array, state: Any, extra: Mapping[str, Any]) -> Scalars:
        return (rate_at(configured, count, extra) * weight_decay,), {}

    return from_stage(
        Stage("decay_last", _decayed, ("params",), scalars=scalars, takes=("learning_rate",))
    )


def _decayed(u: jax.Array, p: jax.Array, rate: Numeric) -> jax.Array:
    return u - rate * (p + u)
