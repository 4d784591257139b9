"""The parameters of a torch state dict: their leaves, their arrays and the layout of these."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np

from adamfn.trees import describe

Array: TypeAlias = np.ndarray[Any, Any]

Layout: TypeAlias = Callable[[str, Array], Array]
"""A function of a leaf's path and an array in one layout, which returns it in the other."""

Paths: TypeAlias = Sequence[str | None] | Mapping[Any, str | None] | None
"""The leaf's path for each torch parameter, in its order or by its name or key."""


class TorchParameter(NamedTuple):
    """One parameter in a state dict."""

    key: Any
    """Its key in the state dict's `state`: a number, or a name where another tool wrote it."""
    name: str | None
    """Its name, if the optimizer was given names."""
    group_index: int
    group: Mapping[str, Any]
    """Its group's hyperparameters."""
    state: Mapping[str, Any]
    """Its entries in `state`; empty before the first step."""

    def __str__(self) -> str:
        """Its name in error messages."""
        return f"torch's parameter {self.key!r}" + (f" ({self.name})" if self.name else "")


def parameters_of(state_dict: Any) -> list[TorchParameter]:
    """The parameters of a state dict, in torch's order."""
    parts: Mapping[str, Any] = state_dict if isinstance(state_dict, Mapping) else {}
    state, groups = parts.get("state"), parts.get("param_groups")
    listed = isinstance(groups, Sequence) and all(
        isinstance(group, Mapping) and "params" in group for group in cast("list[Any]", groups)
    )
    if not (isinstance(state, Mapping) and listed):
        kinds = ", ".join(f"{key}: {type(value).__name__}" for key, value in parts.items())
        raise TypeError(
            f"interop.torch: found {kinds or f'a {type(state_dict).__name__}'}; expected a torch"
            " optimizer's state_dict(): a mapping state, and a list param_groups of mappings with"
            " the key params."
        )
    known = cast("Mapping[Any, Any]", state)
    parameters = [
        TorchParameter(key, name, index, group, _unwrapped(known.get(key, {})))
        for index, group in enumerate(cast("list[Mapping[str, Any]]", groups))
        for key, name in _keys_and_names(index, group)
    ]
    keys = [parameter.key for parameter in parameters]
    for key, entries in known.items():
        if key not in keys or not isinstance(entries, Mapping):
            raise ValueError(
                f"interop.torch: state has a {type(entries).__name__} at {key!r}; expected a"
                f" mapping for each of the groups' params, {', '.join(map(repr, keys))}. (JSON"
                " makes strings of numbers: turn them back.)"
            )
    return parameters


def _keys_and_names(index: int, group: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    keys, names = group["params"], group.get("param_names") or None
    listed = isinstance(keys, Sequence) and not isinstance(keys, str)
    kinds = {type(key).__name__ for key in cast("list[Any]", keys)} if listed else {repr(keys)}
    if not kinds <= {"int", "str"}:
        raise TypeError(
            f"interop.torch: params of group {index} has {', '.join(sorted(kinds))}; expected a"
            " list of numbers or names. optimizer.state_dict() has them, optimizer.param_groups the"
            " tensors themselves."
        )
    if names and not (isinstance(names, Sequence) and len(names) == len(keys)):
        raise ValueError(
            f"interop.torch: group {index} has the param_names {names!r} for {len(keys)} params;"
            " expected a name for each."
        )
    return list(zip(keys, names or [None] * len(keys), strict=True))


def _unwrapped(entries: Any) -> Any:
    """The entries of a parameter, without the wrapper that bitsandbytes puts around codes."""
    codes = isinstance(entries, Mapping) and entries.get("__bnb_optimizer_quant_state__")
    return {**entries, **cast("Any", codes)} if isinstance(codes, Mapping) else entries


def match(
    parameters: Sequence[TorchParameter], leaves: Sequence[str], paths: Any
) -> dict[str, TorchParameter]:
    """The torch parameter of every leaf, by the leaf's path and in torch's order."""
    if isinstance(paths, str) or not isinstance(paths, Sequence | Mapping | None):
        raise TypeError(
            f"interop.torch: paths is {paths!r}; expected a sequence of paths, or a mapping from"
            " torch's names or numbers to paths."
        )
    known = [key for p in parameters for key in (p.key, p.name)]
    if isinstance(paths, Mapping):
        given = cast("Mapping[Any, str | None]", paths)
        unknown = [key for key in given if key not in known]
        missing = [p for p in parameters if p.key not in given and p.name not in given]
        if unknown or missing:
            wrong = f"has no entry for {missing[0]}" if missing else f"names {unknown[0]!r}"
            raise ValueError(
                f"interop.torch: paths {wrong}; expected the path of a leaf, or None, for each of"
                f" {', '.join(p.name or str(p.key) for p in parameters)}."
            )
        chosen = [given[p.name if p.name in given else p.key] for p in parameters]
    else:
        chosen = list(leaves if paths is None else cast("Sequence[str | None]", paths))
    if len(chosen) != len(parameters):
        left = list(map(str, chosen[len(parameters) :] or parameters[len(chosen) :]))
        raise ValueError(
            f"interop.torch: {'params has leaves' if paths is None else 'paths has entries'} for"
            f" {len(chosen)} parameters, expected {len(parameters)} as in the state dict; one side"
            f" alone has {', '.join(left[:5])}{', ...' * (len(left) > 5)}. paths= says which leaf"
            " each torch parameter is, None for one without a leaf."
        )
    matched: dict[str, TorchParameter] = {}
    for path, parameter in zip(chosen, parameters, strict=True):
        if path is not None and (path not in leaves or path in matched):
            twice = f"{matched[path]} and for " if path in matched else ""
            raise ValueError(
                f"interop.torch: paths has {path!r} for {twice}{parameter}; expected one of the"
                f" leaves {', '.join(leaves)}, each for one parameter."
            )
        matched |= {} if path is None else {path: parameter}
    for path in leaves:
        if path not in matched:
            raise ValueError(
                f"interop.torch: no torch parameter matches the leaf at {path}; expected one for"
                " each leaf. Add it to paths=, or leave the leaf out of params."
            )
    return matched


def array_of(what: str, value: Any) -> Array:
    """A tensor or array of any device as a NumPy array; torch's bfloat16 as float32."""
    if getattr(value, "is_sparse", False) or "sparse" in str(getattr(value, "layout", "")):
        raise TypeError(
            f"interop.torch: {what} is a sparse tensor; expected a dense one. Make it dense with"
            " .to_dense()."
        )
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            value = value.float() if "bfloat16" in str(value.dtype) else value
        array = np.asarray(value)
    except Exception as error:  # torch and NumPy raise any kind; a JAX tracer likewise
        raise TypeError(
            f"interop.torch: {what} is a {type(value).__name__} that NumPy cannot read; expected an"
            " array of real numbers, outside jax.jit."
        ) from error
    if array.dtype.kind not in "fiu" and str(array.dtype) != "bfloat16":
        found = describe(value) if hasattr(value, "shape") else repr(value)
        raise TypeError(f"interop.torch: {what} is {found}; expected an array of real numbers.")
    return array


def number_of(what: str, value: Any) -> float:
    """A number, or a tensor of one, as a Python number."""
    try:
        number = float("" if isinstance(value, str | bool) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"interop.torch: {what} is {value!r}; expected a number.") from error
    if not math.isfinite(number):
        raise TypeError(f"interop.torch: {what} is {number}; expected a finite number.")
    return number


def laid_out(
    what: str, array: Array, path: str, layout: Layout | None, shape: Sequence[int] | None
) -> Array:
    """A moment in the other library's layout, checked for its shape."""
    if not callable(layout or to_flax):
        raise TypeError(
            f"interop.torch: layout is {layout!r}; expected a function of a leaf's path and an"
            " array, such as to_flax or from_flax."
        )
    if layout is not None:
        array = array_of(f"layout's result for {path}", layout(path, array))
    if shape is not None and array.shape != tuple(shape):
        raise ValueError(
            f"interop.torch: {what}, matched with {path}: found the shape {array.shape}, expected"
            f" {tuple(shape)}. layout= moves axes (to_flax and from_flax for Flax's kernels);"
            " paths= says which leaf it is."
        )
    return array


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

    >>> import numpy as np
    >>> from adamfn.interop.torch import from_flax
    >>> print(from_flax("conv/kernel", np.zeros((5, 7, 3, 16))).shape)
    (16, 3, 5, 7)
    """
    return np.moveaxis(array, (-1, -2), (0, 1)) if _is_kernel(path, array) else array


def _is_kernel(path: str, array: Array) -> bool:
    return path.split("/")[-1] == "kernel" and array.ndim >= 2
