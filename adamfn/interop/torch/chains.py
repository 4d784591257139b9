"""The chain that does what torch, or one of its look-alikes, does with a group's settings."""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

import adamfn
from adamfn.chains.chain import from_stage
from adamfn.chains.transform import GradientTransformation, Transformation
from adamfn.core.averages import Averages
from adamfn.core.formulas import ratio
from adamfn.core.hyperparameters import ScalarOrSchedule, scheduled
from adamfn.core.stage import Scalars, Stage
from adamfn.interop.torch.members import Member, decoupled_in, possible_classes
from adamfn.interop.torch.parameters import TorchParameter, number_of
from adamfn.stages.moments import from_moments
from adamfn.stages.rates import rate_at

_MAXIMIZE = from_stage(Stage("maximize", jnp.negative))


def continue_with(
    member: Member,
    parameter: TorchParameter,
    optimizer: str | None,
    learning_rate: ScalarOrSchedule | None,
) -> GradientTransformation:
    """The chain that does what torch does with the hyperparameters of a parameter's group."""
    group, of = parameter.group, f"in the group of {parameter}"
    for key in ("lr", "betas", "eps", *member.hyperparameters):
        if key not in group:
            raise ValueError(
                f"interop.torch: the group of {parameter} has no {key}; found {', '.join(group)}."
                " Pass the state_dict() of the optimizer itself."
            )
    try:
        b1, b2 = (number_of("", b) for b in group["betas"])
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"interop.torch: betas {of} is {group['betas']!r}; expected two numbers."
        ) from error
    more = {key: number_of(f"{key} {of}", group[key]) for key in member.hyperparameters}
    weight_decay = number_of(f"weight_decay {of}", group.get("weight_decay", 0.0))
    decoupled = decoupled_in(group)
    if decoupled is None:
        decoupled = "AdamW" in (optimizer, *possible_classes(parameter)[:1])

    rate = number_of(f"lr {of}", group["lr"]) if learning_rate is None else learning_rate
    corrects = bool(group.get("correct_bias", group.get("bias_correction", True)))
    last = "correct_bias" in group  # transformers' AdamW decays the parameter that has moved
    try:
        stage = _with_uncorrected_eps if last or not corrects else member.stage
        stages: list[Transformation] = [stage(b1, b2, number_of(f"eps {of}", group["eps"]), **more)]
        if group.get("caution"):
            stages.append(adamfn.cautious_updates())
        if corrects:
            stages.append(adamfn.bias_correct(b1 * member.corrects[0], b2 * member.corrects[1]))
        if weight_decay and not last:
            place = len(stages) if decoupled else 0
            stages.insert(place, adamfn.add_decayed_weights(weight_decay))
        stages.append(adamfn.scale_by_lr(rate))
        if weight_decay and last:
            stages.append(_decay_last(weight_decay, rate))
    except ValueError as error:
        raise ValueError(f"interop.torch: the group of {parameter}: {error}") from error
    return adamfn.chain(*([_MAXIMIZE] if group.get("maximize") else []), *stages)


def _with_uncorrected_eps(b1: float, b2: float, eps: float) -> GradientTransformation:
    """`scale_by_moments`, but u = m / (sqrt(v) + eps): eps is in units of the uncorrected root."""
    at = Averages.of(b1, b2, eps)
    return from_moments("scale_by_moments", ratio, "float32", lambda *_: ((at, None), {}))


def _decay_last(weight_decay: float, learning_rate: ScalarOrSchedule) -> GradientTransformation:
    """The decay of a parameter that has moved: u - rate weight_decay (p + u)."""
    configured = scheduled("learning_rate", learning_rate)

    def scalars(count: jax.Array, state: Any, extra: Mapping[str, Any]) -> Scalars:
        return (rate_at(configured, count, extra) * weight_decay,), {}

    takes = ("learning_rate",)
    return from_stage(
        Stage("decay_last", _decayed, reads=("params",), scalars=scalars, takes=takes)
    )


def _decayed(u: jax.Array, p: jax.Array, rate: chex.Numeric) -> jax.Array:
    return u - rate * (p + u)
