# SPDX-License-Identifier: Apache-2.0
"""The parameters of a torch state dict: their leaves, their arrays and the layout of these."""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np

from adamfn.trees import described, shown

Array: TypeAlias = np.ndarray[Any, Any]

Layout: TypeAlias = Callable[[str, Array], Array]
"""A function of a leaf's path and an array in one layout, which returns it in the other."""

Paths: TypeAlias = Sequence[str | None] | Mapping[Any, str | None] | None
"""The leaf's path for each torch parameter, in its order or by its name or key."""


class TorchParameter(NamedTuple):
    """One parameter in a state dict, with the hyperparameters of its group."""

    key: Any
    """Its key in the state dict's `state`: a number, or a name where another tool wrote it."""
    name: str | None
    group_index: int
    group: Mapping[str, Any]
    state: Mapping[str, Any]
    """Its entries in `state`; empty before the first step."""

    def __str__(self) -> str:
        """What error messages call it."""
        return f"torch's parameter {self.key!r}" + (f" ({self.name})" if self.name else "")

    def entry(self, part: Literal["group", "state"], key: str) -> Any:
        """An entry of its group or state, which must be there."""
        entries: Mapping[str, Any] = getattr(self, part)
        if entries.get(key) is None:
            raise ValueError(
                f"interop.torch: the {part} of {self} has no {key}; found"
                f" {', '.join(map(str, entries))}. Pass the state_dict() of the optimizer itself."
            )
        return entries[key]

    def number(self, part: Literal["group", "state"], key: str) -> float:
        """A number of its group or state."""
        of = "in the group of" if part == "group" else "of"
        return number_of(f"{key} {of} {self}", self.entry(part, key))


def check(fits: Any, found: str, expected: str) -> None:
    """Raises a TypeError unless an argument, or a part of a state dict, fits."""
    if not fits:
        raise TypeError(f"interop.torch: {found}; expected {expected}")


def parameters_of(state_dict: Any) -> list[TorchParameter]:
    """The parameters of a state dict, in torch's order."""

    def check_part(fits: bool, what: str, found: Any) -> None:
        check(
            fits,
            f"{what} is {reprlib.repr(found)}",
            "a torch optimizer's state_dict(), {'state': {0: {...}}, 'param_groups': [{'params':"
            " [0], ...}]}: numbers or names as params, each with a mapping in state and, if there"
            " are any, a name in param_names. (optimizer.param_groups has the tensors themselves."
            " JSON makes strings of numbers: turn them back.)",
        )

    parts: Any = state_dict if isinstance(state_dict, Mapping) else {}
    state, groups = parts.get("state"), parts.get("param_groups")
    check_part(isinstance(state, Mapping) and _is_list(groups), "the state dict", state_dict)
    parameters: list[TorchParameter] = []
    for index, group in enumerate(cast("Sequence[Any]", groups)):
        keys: Any = cast("Any", group).get("params") if isinstance(group, Mapping) else None
        fits = _is_list(keys) and all(isinstance(key, int | str) for key in keys)
        check_part(fits, f"params of group {index}", keys)
        names = group.get("param_names") or [None] * len(keys)
        fits = _is_list(names) and len(names) == len(keys)
        check_part(fits, f"param_names of group {index}", names)
        for key, name in zip(keys, names, strict=True):
            entries = state.get(key, {})
            if isinstance(entries, Mapping):  # bitsandbytes puts a wrapper around codes
                entries = {**entries, **(entries.get("__bnb_optimizer_quant_state__") or {})}
            parameters.append(TorchParameter(key, name, index, group, entries))
    known = [parameter.key for parameter in parameters]
    for key, entries in state.items():
        fits = key in known and isinstance(entries, Mapping)
        check_part(fits, f"state[{key!r}]", entries)
    return parameters


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def match(
    parameters: Sequence[TorchParameter], leaves: Sequence[str], paths: Any
) -> dict[str, TorchParameter]:
    """The torch parameter of every leaf, by the leaf's path and in torch's order."""
    chosen: list[Any] = [*leaves] if paths is None else [*paths] if _is_list(paths) else [paths]
    if isinstance(paths, Mapping):
        given = cast("Mapping[Any, Any]", paths)
        known = {key for p in parameters for key in (p.key, p.name)}
        chosen = [given.get(p.name, given.get(p.key, ...)) for p in parameters]
        chosen += [key for key in given if key not in known]
    chosen += [...] * (len(parameters) - len(chosen))
    matched, wrong = dict[str, TorchParameter](), list[str]()
    for path, parameter in zip_longest(chosen, parameters):
        if parameter is None or path not in (None, *leaves) or path in matched:
            found = "nothing" if path is ... else repr(path)
            wrong.append(f"{found} for {parameter or 'no torch parameter'}")
        elif path is not None:
            matched[path] = parameter
    wrong += [f"nothing for the leaf at {path}" for path in leaves if path not in matched]
    if wrong:
        raise ValueError(
            f"interop.torch: {'params' if paths is None else 'paths'} has {wrong[0]}; expected one"
            f" of the leaves {', '.join(leaves)} for each of {', '.join(map(str, parameters))}."
            " paths= says which leaf each torch parameter is, None for one without a leaf: a"
            " sequence in torch's order, or a mapping from its names or numbers."
        )
    return matched


def array_of(what: str, value: Any) -> Array:
    """A tensor or array of any device as one of NumPy's, its floats as float32 at least."""
    sparse = getattr(value, "is_sparse", False) or "sparse" in str(getattr(value, "layout", ""))
    array = np.empty(0, object)
    try:
        if hasattr(value, "detach") and not sparse:
            value = value.detach().cpu()
            value = value.float() if "bfloat16" in str(value.dtype) else value
        array = array if sparse else np.asarray(value)
    except Exception:
        pass  # torch and NumPy raise any kind; a JAX tracer likewise
    check(
        array.dtype.kind in "fiu" or str(array.dtype) == "bfloat16",
        f"{what} is {'sparse ' * sparse}{described(value)}",
        "a dense array of real numbers, outside jax.jit. (.to_dense() makes a sparse one dense.)",
    )
    narrow = array.dtype.kind not in "iu" and array.dtype.itemsize < 4
    return array.astype(np.float32) if narrow else array


def number_of(what: str, value: Any, way_out: str = "") -> float:
    """A number, or a tensor of one, as a Python number."""
    try:
        number = math.nan if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    check(math.isfinite(number), f"{what} is {shown(value)}", f"a finite number.{way_out}")
    return number


def laid_out(what: str, value: Any, path: str, layout: Layout | None, shape: Any) -> Array:
    """A moment in the other library's layout, checked for its shape."""
    what = f"{what}, matched with {path},"
    array = array_of(what, value)
    if layout is not None:
        check(callable(layout), f"layout is {shown(layout)}", "one like to_flax.")
        array = array_of(f"layout's result for {path}", layout(path, array))
    if shape is not None and array.shape != tuple(shape):
        raise ValueError(
            f"interop.torch: {what} has the shape {array.shape}; expected {tuple(shape)}. layout="
            " moves axes (to_flax and from_flax for Flax's kernels); paths= says which leaf it is."
        )
    return array


def to_flax(path: str, array: Array) -> Array:
    """Lays out a torch weight as Flax's kernel; a `layout` for `from_state_dict`.

    A leaf named `kernel` gets the axes (out, in, *window) moved to (*window, in, out). Other leaves
    stay. It serves the parameters themselves too, but not transposed convolutions, whose weights
    torch has as (in, out, *window).

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


_BLOCKS = (256, 2048, 64, 128, 512, 1024, 4096)
"""Sizes of bitsandbytes' blocks: the present one, the one before 0.44, others."""


def with_plain_moments(parameter: TorchParameter) -> TorchParameter:
    """The parameter with moments under torch's names, decoded if they are bitsandbytes' codes."""
    state = parameter.state
    if "state1" not in state:
        return parameter
    for key, argument in (("gnorm_vec", "percentile_clipping"), ("unorm_vec", "max_unorm")):
        if key in state:
            raise ValueError(
                f"interop.torch: the state of {parameter} has {key}, of bitsandbytes' {argument},"
                " which no chain here does. Clip by optax, and leave the key out of the state."
            )
    moments = {"exp_avg": _decoded(parameter, 1), "exp_avg_sq": _decoded(parameter, 2)}
    return parameter._replace(state={"step": state.get("step"), **moments})


def _decoded(parameter: TorchParameter, number: int) -> Array:
    def entry(key: str) -> Array:
        return array_of(f"{key}{number} of {parameter}", parameter.entry("state", f"{key}{number}"))

    codes = entry("state")
    if codes.dtype != np.uint8:
        return codes
    table = entry("qmap")
    scales = entry("absmax" if f"absmax{number}" in parameter.state else "max").reshape(-1)
    given = parameter.state.get("blocksize")
    sizes = (*_BLOCKS, codes.size) if given is None else (int(number_of("blocksize", given)),)
    size = next((n for n in sizes if n > 0 and -(-codes.size // n) == scales.size), None)
    if size is None or table.shape != (256,):
        raise ValueError(
            f"interop.torch: {parameter} has {scales.size} scales and a table qmap{number} of the"
            f" shape {table.shape} for {codes.size} elements; expected a scale for each block of"
            f" {' or '.join(map(str, sizes[:2]))}, and the shape (256,). Add the size of its blocks"
            " to its state, as blocksize."
        )
    values = table.astype(np.float32)[codes.reshape(-1)]
    return (values * np.repeat(scales, size)[: codes.size]).reshape(codes.shape)
