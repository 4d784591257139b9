"""The chain that does what torch, or one of its look-alikes, does with a group's settings."""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

import adamfn
from adamfn.chains.chain import from_stage
from adamfn.chains.transform import GradientTransformation, Transformation
from adamfn.core.averages import MomentScalars, decay
from adamfn.core.formulas import ratio
from adamfn.core.hyperparameters import ScalarOrSchedule, scheduled, value_at
from adamfn.core.stage import Scalars, Stage
from adamfn.interop.torch.members import Member, possible_classes
from adamfn.interop.torch.parameters import TorchParameter, number_of
from adamfn.interop.torch.settings import decoupled_in
from adamfn.stages.moments import from_moments


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
      parameter: the parameter, of settings that were checked.
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
    weight_decay = number("weight_decay", group.get("weight_decay", 0.0))
    decoupled = decoupled_in(group)
    if decoupled is None:
        decoupled = "AdamW" in (optimizer, *possible_classes(parameter)[:1])

    rate = number("lr", group["lr"]) if learning_rate is None else learning_rate
    corrects = bool(group.get("correct_bias", group.get("bias_correction", True)))
    last = "correct_bias" in group  # transformers' AdamW decays what it has moved
    try:
        stage = _with_eps_as_it_is if last or not corrects else member.stage
        stages: list[Transformation] = [stage(b1, b2, number("eps", group["eps"]), **more)]
        if group.get("caution"):
            stages.append(_cautious(-1.0 if group.get("maximize") else 1.0))
        if corrects:
            corrected = b1 * member.corrects[0], b2 * member.corrects[1]
            stages.append(adamfn.bias_correct(*corrected))
        stages.append(adamfn.scale_by_lr(rate))
        if weight_decay and last:
            stages.append(_decay_last(weight_decay, rate))
        elif weight_decay:
            place = len(stages) - 1 if decoupled else 0
            stages.insert(place, adamfn.add_decayed_weights(weight_decay))
    except ValueError as error:
        raise ValueError(f"{caller}: the group of {parameter}: {error}") from error
    if group.get("maximize"):
        stages.insert(0, _MAXIMIZE)
    return adamfn.chain(*stages)


_MAXIMIZE = from_stage(Stage("maximize", jnp.negative))


def _with_eps_as_it_is(b1: float, b2: float, eps: float) -> GradientTransformation:
    """`scale_by_moments`, but u = m / (sqrt(v) + eps): eps is not in units of a corrected root."""
    mean, square = decay("b1", b1), decay("b2", b2)
    zero = jnp.zeros(())
    return from_moments(
        "scale_by_moments",
        ratio,
        lambda *_: (
            (MomentScalars(mean.shares, square.shares, jnp.asarray(eps, float), zero), None),
            {},
        ),
        "float32",
    )


def _cautious(sign: float) -> GradientTransformation:
    """Caution, of timm: only what points the way of the gradient moves, and by that much farther.

    Liang, Chen, Liu and Liu, Cautious Optimizers, 2024 (arXiv 2411.16085).
    """
    return from_stage(
        Stage(
            "caution",
            _where_signs_agree,
            reads=("grads",),
            scalars=lambda count, state, extra: ((sign,), {}),
            mean=_signs_agree,
        )
    )


def _where_signs_agree(
    u: jax.Array, g: jax.Array, sign: chex.Numeric, share: jax.Array
) -> jax.Array:
    return u * (_signs_agree(u, g, sign) / jnp.maximum(share, 1e-3))


def _signs_agree(u: jax.Array, g: jax.Array, sign: chex.Numeric) -> jax.Array:
    return (jnp.sign(u) * jnp.sign(g) * sign > 0).astype(jnp.real(u).dtype)


def _decay_last(weight_decay: float, learning_rate: ScalarOrSchedule) -> GradientTransformation:
    """The decay of a parameter that has moved: u - rate weight_decay (p + u)."""
    configured = scheduled("learning_rate", learning_rate)

    def scalars(count: jax.Array, state: Any, extra: Mapping[str, Any]) -> Scalars:
        given = extra.get("learning_rate")
        chosen = configured if given is None else scheduled("learning_rate", given)
        return (value_at("learning_rate", chosen, count - 1) * weight_decay,), {}

    return from_stage(
        Stage(
            "decay_last",
            _decayed,
            reads=("params",),
            scalars=scalars,
            takes=("learning_rate",),
        )
    )


def _decayed(u: jax.Array, p: jax.Array, rate: chex.Numeric) -> jax.Array:
    return u - rate * (p + u)
