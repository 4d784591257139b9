"""Adam for JAX: pure functions over pytrees, exact from the first step on."""

from adamfn.adam import adam, adamw
from adamfn.bias import bias_correct
from adamfn.learning_rate import scale_by_lr
from adamfn.moments import scale_by_moments
from adamfn.transform import GradientTransformation, apply_updates, chain
from adamfn.weight_decay import add_decayed_weights

__version__ = "0.1.0"

__all__ = [
    "GradientTransformation",
    "adam",
    "adamw",
    "add_decayed_weights",
    "apply_updates",
    "bias_correct",
    "chain",
    "scale_by_lr",
    "scale_by_moments",
]
