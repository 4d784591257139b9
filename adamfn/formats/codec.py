"""A codec: how one moment is stored, whatever the other is."""

import inspect
from typing import Any, NamedTuple, Protocol

import jax


class Encoded(NamedTuple):
    """One moment of one leaf, as a codec stores it."""

    codes: jax.Array | None
    """An array of the leaf's shape, or None."""
    scales: Any = ()
    """A tree of arrays of other shapes."""


class Codec(Protocol):
    """How one moment of one leaf is stored, whatever the other is. Frozen and hashable."""

    def encode(self, x: jax.Array, bits: jax.Array | None) -> Encoded:
        """Stores a moment.

        Args:
          x: float32.
          bits: int32 of its shape, 16 random bits each; None rounds to nearest.
        """
        ...

    def decode(self, codes: Any, scales: Any) -> jax.Array:
        """Returns float32 of the leaf's shape, or for nu one that broadcasts to it."""
        ...

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Whether it stores leaves of this shape."""
        ...


def is_codec(value: Any) -> bool:
    """Whether something is a `Codec`: its `holds` takes a shape alone, a format's a dtype too."""
    methods = [getattr(value, name, None) for name in ("encode", "decode", "holds")]
    if isinstance(value, type) or not all(map(callable, methods)):
        return False
    return len(inspect.signature(value.holds).parameters) == 1
