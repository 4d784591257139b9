# SPDX-License-Identifier: Apache-2.0
"""Optimizer states between torch and adamfn: a run goes on in the other library.

Tensors are read as NumPy arrays; torch is not imported.
"""

from adamfn.interop.torch.files import load
from adamfn.interop.torch.parameters import from_flax, to_flax
from adamfn.interop.torch.state_dicts import from_state_dict, to_state_dict

__all__ = ["from_flax", "from_state_dict", "load", "to_flax", "to_state_dict"]
