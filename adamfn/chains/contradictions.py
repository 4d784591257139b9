# SPDX-License-Identifier: Apache-2.0
"""Stages that contradict one another, or stand where they do something else than they say."""

from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Any

from adamfn.core.stage import Stage
from adamfn.core.weights import Weights
from adamfn.trees import shown

INDEPENDENT = "add_decayed_weights(independent=True)"
"""The name of the stage whose decay no rate multiplies."""

_DECAYS = {"add_decayed_weights", "add_corrected_decay", INDEPENDENT}

_NOT_AFTER = {
    ("scale_by_lr", "scale_by_lr"): "which turns the signs around: two rates would go uphill. Leave"
    " one out; optax.scale multiplies by another number.",
    ("scale_by_lr", "add_decayed_weights"): "which turns the signs around: it makes parameters"
    " grow, and if it is cautious, it compares the wrong signs. Put it before the rate, as adamw"
    " does, or pass independent=True for a decay that no rate multiplies.",
    ("scale_by_lr", "cautious_updates"): "which turns the signs around that it compares: it would"
    " leave out what it is to keep. Put it before.",
    (INDEPENDENT, "scale_by_lr"): "and would multiply that decay and turn its sign. Put it before,"
    " or leave out independent=True: the rate then multiplies the decay, as in AdamW.",
    ("scale_by_atan2_moments", "bias_correct"): "whose averages are corrected inside the angle."
    " Leave it out.",
    ("scale_by_ademamix", "bias_correct"): "whose averages are corrected there. Leave it out.",
    ("scale_by_adopt", "bias_correct"): "whose averages need no correction. Leave it out.",
    ("scale_by_infinity_moments", "clip_updates"): "which has no average of squares to compare"
    " with. Leave it out.",
}
"""Why one stage may not stand after another, by the names of both."""


def check_order(parts: Sequence[Any], unwrapped: Sequence[Any]) -> None:
    """Raises ValueError if two parts of a chain contradict one another; says what to do.

    `unwrapped` has the stages inside our wrappers in place of these.
    """
    for part, after in combinations(parts, 2):
        if "taken" in getattr(part, "start", ()) and not isinstance(after, Stage):
            raise ValueError(
                f"chain: {part.name} stands before {shown(after)}, which is not fused with it and"
                " would still update on skipped steps. Put other transformations first, or skip the"
                " whole chain with optax.apply_if_finite (of gradients no narrower than their"
                " updates) or a condition of your own."
            )
    for before, part in pairwise(unwrapped):
        stages = isinstance(before, Stage) and isinstance(part, Stage)
        if stages and "grads" in part.takes and "grads" not in before.takes:
            rate = " The rate of a step after it would no longer be the one that was set."
            raise ValueError(
                f"chain: {part.name} stands after {before.name}. It looks at the gradients that"
                " the chain is given, and acts on them before any average is taken."
                f"{rate if before.name == 'scale_by_lr' else ''} Put it first; to clip updates,"
                " optax.clip_by_global_norm may stand anywhere."
            )
    for part, after in combinations(unwrapped, 2):
        name, next_name = (getattr(each, "name", "") for each in (part, after))
        if (name, next_name) in _NOT_AFTER:
            reason = _NOT_AFTER[name, next_name]
            raise ValueError(f"chain: {next_name} stands after {name}, {reason}")
        reads, reads_after = (getattr(each, "reads", ()) for each in (part, after))
        lands = isinstance(getattr(part, "formula", None), Weights) or "new_params" in reads
        if lands and ("new_params" not in reads_after or "new_params" in reads):
            raise ValueError(
                f"chain: {name} stands before {next_name or shown(after)}. It needs to know where"
                " the weights land, so nothing may change the updates after it. Put it last."
            )
        if {name, next_name} <= _DECAYS and (part.mask is None or after.mask is None):
            raise ValueError(
                f"chain: {name} and {next_name} would both decay the same parameters. Leave one"
                " out, or give each a mask of its own parameters."
            )
