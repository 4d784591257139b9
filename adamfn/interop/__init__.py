"""States in and out: of checkpoints, of grown models, of other formats, of torch and optax.

No module imports the library that it is named after, but for `adamfn.interop.flax`: its classes are
subclasses of flax's. It is imported by whoever wants it, and needs flax.
"""

from adamfn.interop.converting import convert
from adamfn.interop.growing import CarriedOver, carry_over
from adamfn.interop.restoring import restore

__all__ = ["CarriedOver", "carry_over", "convert", "restore"]
