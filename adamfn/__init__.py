# SPDX-License-Identifier: Apache-2.0
"""Adam for JAX as pure functions over pytrees."""

from adamfn import formats, monitor, sharding
from adamfn.backends.report import backend
from adamfn.chains.chain import chain, from_stage, with_backend
from adamfn.chains.packed import packed, repack
from adamfn.chains.step import step
from adamfn.chains.transform import GradientTransformation, apply_updates
from adamfn.core import masks
from adamfn.core.stage import EmptyState, Stage
from adamfn.recipes import adam, adamax, adamw, amsgrad, lazy_adam, nadam, radam, scale_by_adam
from adamfn.stages.ademamix import ademamix, scale_by_ademamix
from adamfn.stages.adopt import adopt, scale_by_adopt
from adamfn.stages.average_weights import average_weights, averaged_weights
from adamfn.stages.gradients import clip_by_global_norm, skip_outliers
from adamfn.stages.moments import (
    bias_correct,
    scale_by_infinity_moments,
    scale_by_max_moments,
    scale_by_moments,
)
from adamfn.stages.rates import add_corrected_decay, add_decayed_weights, scale_by_lr
from adamfn.stages.round_weights import narrow_weights, round_weights, whole_weights
from adamfn.stages.statistics import cautious_updates, clip_updates
from adamfn.stages.variants import (
    scale_by_atan2_moments,
    scale_by_lazy_moments,
    scale_by_nesterov_moments,
    scale_by_rectified_moments,
)

__version__ = "0.2.0"

__all__ = [
    "EmptyState", "GradientTransformation", "Stage", "adam", "adamax", "adamw",
    "add_corrected_decay", "add_decayed_weights", "ademamix", "adopt", "amsgrad",
    "apply_updates", "average_weights", "averaged_weights", "backend", "bias_correct",
    "cautious_updates", "chain", "clip_by_global_norm", "clip_updates", "formats", "from_stage",
    "lazy_adam", "masks", "monitor", "nadam", "narrow_weights", "packed", "radam", "repack",
    "round_weights", "scale_by_adam", "scale_by_ademamix", "scale_by_adopt",
    "scale_by_atan2_moments", "scale_by_infinity_moments", "scale_by_lazy_moments",
    "scale_by_lr", "scale_by_max_moments", "scale_by_moments", "scale_by_nesterov_moments",
    "scale_by_rectified_moments", "sharding", "skip_outliers", "step", "whole_weights",
    "with_backend",
]  # fmt: skip
