"""Adam for JAX: pure functions over pytrees, exact from the first step on."""

from adamfn import formats, fused, sharding
from adamfn.adam import adam, adamw
from adamfn.adamax import adamax, scale_by_infinity_moments
from adamfn.amsgrad import amsgrad, scale_by_max_moments
from adamfn.bias import bias_correct
from adamfn.fused import fused_adam, fused_adamw
from adamfn.lazy_adam import lazy_adam, scale_by_lazy_moments
from adamfn.learning_rate import scale_by_lr
from adamfn.moments import scale_by_moments
from adamfn.nadam import nadam, scale_by_nesterov_moments
from adamfn.radam import radam, scale_by_rectified_moments
from adamfn.step import SteppingTransformation, step
from adamfn.transform import GradientTransformation, apply_updates, chain
from adamfn.weight_decay import add_decayed_weights

__version__ = "0.1.0"

__all__ = [
    "GradientTransformation",
    "SteppingTransformation",
    "adam",
    "adamax",
    "adamw",
    "add_decayed_weights",
    "amsgrad",
    "apply_updates",
    "bias_correct",
    "chain",
    "formats",
    "fused",
    "fused_adam",
    "fused_adamw",
    "lazy_adam",
    "nadam",
    "radam",
    "scale_by_infinity_moments",
    "scale_by_lazy_moments",
    "scale_by_lr",
    "scale_by_max_moments",
    "scale_by_moments",
    "scale_by_nesterov_moments",
    "scale_by_rectified_moments",
    "sharding",
    "step",
]
