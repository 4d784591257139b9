"""Stages that contradict one another, or stand where they do something else than they say."""

from collections.abc import Sequence
from typing import Any

from adamfn.core.formulas import add_agreeing_multiple, where_agreeing
from adamfn.core.stage import Stage
from adamfn.core.weights import Weights

INDEPENDENT = "add_decayed_weights(independent=True)"
"""The name of the stage whose decay no rate multiplies."""

_DECAYS = ("add_decayed_weights", "add_corrected_decay", INDEPENDENT)


def check_order(parts: Sequence[Any], unwrapped: Sequence[Any]) -> None:
    """Checks the parts of a chain, in their order.

    Args:
      parts: stages, and transformations that are not fused with them.
      unwrapped: the same, with the stages inside our wrappers in place of these.

    Raises:
      ValueError: two contradict one another; says why, and what to do.
    """
    for place, part in enumerate(parts):
        after = [other for other in parts[place:] if not isinstance(other, Stage)]
        if isinstance(part, Stage) and "taken" in part.start and after:
            raise ValueError(
                f"chain: {part.name} stands before {after[0]!r}, which is not fused with it and"
                " would still update on skipped steps. Put other transformations first, or skip the"
                " whole chain with optax.apply_if_finite or a condition of your own."
            )
    for place, part in enumerate(unwrapped):
        if not isinstance(part, Stage):
            continue
        before = unwrapped[place - 1] if place else None
        if "grads" in part.takes and isinstance(before, Stage) and "grads" not in before.takes:
            rate = " The rate of a step after it would no longer be the one that was set."
            raise ValueError(
                f"chain: {part.name} stands after {before.name}. It looks at the gradients that"
                " the chain is given, and acts on them before any average is taken."
                f"{rate if before.name == 'scale_by_lr' else ''} Put it first; to clip updates,"
                " optax.clip_by_global_norm may stand anywhere."
            )
        if isinstance(part.formula, Weights) and place != len(unwrapped) - 1:
            raise ValueError(
                f"chain: {part.name} stands before {_name_of(unwrapped[place + 1])}. It decides"
                " where the weights land, so nothing may change the updates after it. Put it last."
            )
    stages = [part for part in unwrapped if isinstance(part, Stage)]
    names = [stage.name for stage in stages]
    if "scale_by_lr" in names[_place(names, INDEPENDENT) :]:
        raise ValueError(
            f"chain: scale_by_lr stands after {INDEPENDENT}: the rate would multiply that decay and"
            " turn its sign. Put it last, or leave out independent=True: the rate then multiplies"
            " it, as in AdamW."
        )
    last_rate = len(names) - _place(names[::-1], "scale_by_lr")  # after it, or 0 without one
    for stage in stages[last_rate:] if last_rate else []:
        if stage.name == "add_decayed_weights" and stage.formula is not add_agreeing_multiple:
            raise ValueError(
                "chain: add_decayed_weights stands after scale_by_lr: added to updates that have"
                " their sign already, it makes parameters grow. Put it before the rate, as adamw"
                " does, or pass independent=True for a decay that no rate multiplies."
            )
    for stage in stages[_place(names, "scale_by_lr") :]:
        if stage.formula in (add_agreeing_multiple, where_agreeing):
            raise ValueError(
                f"chain: {stage.name} stands after scale_by_lr, which turns the signs around that"
                " it compares: it would leave out what it is to keep. Put it before."
            )
    if "bias_correct" in names[_place(names, "scale_by_atan2_moments") :]:
        raise ValueError(
            "chain: bias_correct stands after scale_by_atan2_moments, whose averages are corrected"
            " inside the angle. Leave bias_correct out."
        )
    decays = [stage for stage in stages if stage.name in _DECAYS]
    if len(decays) > 1 and any(stage.mask is None for stage in decays):
        raise ValueError(
            f"chain: {decays[0].name} and {decays[1].name} would both decay the same parameters."
            " Leave one out, or give each a mask of its own parameters."
        )


def _name_of(element: Any) -> str:
    return element.name if isinstance(element, Stage) else repr(element)


def _place(names: Sequence[str], name: str) -> int:
    return names.index(name) if name in names else len(names)
