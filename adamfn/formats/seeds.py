"""The seeds of all noise that the step of a leaf rounds with."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from adamfn.formats.base import Seed, seed_of

_NOISE_OF_WEIGHTS = np.uint32(2**31)
"""Added to a leaf's number, so that this noise is that of no leaf's moments."""


class Seeds(NamedTuple):
    """Those of a leaf at a step, made where they are asked for: few programs round both."""

    moments: Callable[[], Seed]
    weights: Callable[[], Seed]

    @staticmethod
    def of(count: jax.Array, number: jax.Array) -> "Seeds":
        """Those of a step, by its count, and of a leaf, by its number in the tree."""
        return Seeds(
            partial(seed_of, count, number), lambda: seed_of(count, number + _NOISE_OF_WEIGHTS)
        )
