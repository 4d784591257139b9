# SPDX-License-Identifier: Apache-2.0
"""States in and out: of checkpoints, of grown models, of other formats, of torch and optax.

Only `flax` and `keras` here import the library they are named after, whose classes they subclass.
"""

from adamfn.interop.converting import convert
from adamfn.interop.growing import CarriedOver, carry_over
from adamfn.interop.restoring import restore

__all__ = ["CarriedOver", "carry_over", "convert", "restore"]
