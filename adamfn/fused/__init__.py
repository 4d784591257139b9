"""Fused Adam: a training update in one pass over the memory.

`fused_adam` and `fused_adamw` are `adam` and `adamw` with a `step` of their own, which
`adamfn.step` takes. `backend` says what runs it here, and why.
"""

from adamfn.fused.adam import fused_adam, fused_adamw
from adamfn.fused.backend import backend
from adamfn.fused.packing import Packed
from adamfn.fused.state import FusedAdamState, from_chain, to_chain

__all__ = [
    "FusedAdamState",
    "Packed",
    "backend",
    "from_chain",
    "fused_adam",
    "fused_adamw",
    "to_chain",
]
