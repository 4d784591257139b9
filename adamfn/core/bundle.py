"""`Bundle`: leaves whose moments are packed, and which are one leaf to a program."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from adamfn.trees import as_array


class Bundle(Sequence[Any]):
    """Several leaves that have one program, and what is kept of them end to end: one leaf to it."""

    def __init__(self, leaves: Sequence[Any]) -> None:
        self._leaves = [as_array(leaf) for leaf in leaves]
        dtypes = {leaf.dtype for leaf in self._leaves}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else jnp.dtype(jnp.float32)
        self.size = sum(leaf.size for leaf in self._leaves)
        self.shape = (self.size,)

    def __getitem__(self, place: Any) -> Any:
        """One of the leaves."""
        return self._leaves[place]

    def __len__(self) -> int:
        """How many they are."""
        return len(self._leaves)
