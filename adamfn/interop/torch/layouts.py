"""Layouts: how the axes of a torch parameter lie in a JAX leaf."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

Layout: TypeAlias = Callable[[str, Array], Array]
"""A function of a leaf's path and an array in one layout, which returns it in the other."""


def check_layout(caller: str, layout: Any) -> None:
    """Checks what is to be a layout, or None.

    Raises:
      TypeError: it is neither.
    """
    if layout is not None and not callable(layout):
        raise TypeError(
            f"{caller}: layout is {layout!r}; expected a function of a leaf's path and an array,"
            " such as to_flax or from_flax."
        )


def to_flax(path: str, array: Array) -> Array:
    """Lays out a torch weight as Flax's kernel; a `layout` for `from_state_dict`.

    A leaf named `kernel` gets the axes (out, in, *window) moved to (*window, in, out), so a dense
    layer's weight is transposed. Other leaves stay. It serves the parameters themselves too. Not
    for transposed convolutions, whose weights torch has as (in, out, *window).

    Args:
      path: the leaf's path, such as `conv/kernel`.
      array: a torch parameter, or a moment of it.

    >>> import numpy as np
    >>> from adamfn.interop.torch import to_flax
    >>> print(to_flax("conv/kernel", np.zeros((16, 3, 5, 7))).shape)
    (5, 7, 3, 16)
    """
    return np.moveaxis(array, (0, 1), (-1, -2)) if _is_kernel(path, array) else array


def from_flax(path: str, array: Array) -> Array:
    """Lays out Flax's kernel as a torch weight: the inverse of `to_flax`, for `to_state_dict`.

    Args:
      path: the leaf's path, such as `conv/kernel`.
      array: the leaf, or a moment of it.

    >>> import numpy as np
    >>> from adamfn.interop.torch import from_flax
    >>> print(from_flax("conv/kernel", np.zeros((5, 7, 3, 16))).shape)
    (16, 3, 5, 7)
    """
    return np.moveaxis(array, (-1, -2), (0, 1)) if _is_kernel(path, array) else array


def _is_kernel(path: str, array: Array) -> bool:
    return path.split("/")[-1] == "kernel" and array.ndim >= 2
