"""A state dict's parameters, and which leaf each of them is."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np

from adamfn.interop.torch.layouts import Array
from adamfn.trees import describe

Paths: TypeAlias = Sequence[str | None] | Mapping[Any, str | None] | None
"""The leaf's path for each torch parameter, in its order or by its name or number."""


class TorchParameter(NamedTuple):
    """One parameter as a state dict has it."""

    key: Any
    """Its key in the state dict's `state`: a number, or a name where another tool wrote it."""
    name: str | None
    """Its own name, where the optimizer was given names."""
    group_index: int
    group: Mapping[str, Any]
    """Its group's hyperparameters."""
    state: Mapping[str, Any]
    """What the optimizer keeps of it; empty before its first step."""

    def __str__(self) -> str:
        """What error messages call it."""
        return f"torch's parameter {self.key!r}" + (f" ({self.name})" if self.name else "")


def parameters_of(caller: str, state_dict: Any) -> list[TorchParameter]:
    """The parameters of a state dict, in torch's order.

    Raises:
      TypeError, ValueError: it is not the state dict of an optimizer.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(
        cast("Iterable[Any]", state_dict)
    ):
        found = (
            f"the keys {', '.join(map(str, cast('Iterable[Any]', state_dict)))}"
            if isinstance(state_dict, Mapping)
            else f"a {type(state_dict).__name__}"
        )
        raise TypeError(
            f"{caller}: found {found}; expected a torch optimizer's state_dict(), with the keys"
            " state and param_groups."
        )
    parts = cast("Mapping[str, Any]", state_dict)
    groups, state = parts["param_groups"], parts["state"]
    if not (
        isinstance(state, Mapping)
        and isinstance(groups, Sequence)
        and all(isinstance(g, Mapping) and "params" in g for g in cast("Sequence[Any]", groups))
    ):
        raise TypeError(
            f"{caller}: state is a {type(state).__name__} and param_groups a"
            f" {type(groups).__name__}; expected a mapping, and a list of mappings with the key"
            " params, as in a torch optimizer's state_dict()."
        )
    listed: list[TorchParameter] = []
    for index, group in enumerate(groups):
        keys = group["params"]
        if not isinstance(keys, Sequence) or isinstance(keys, str):
            raise TypeError(
                f"{caller}: params of group {index} is {keys!r}; expected a list of keys of the"
                " state, as in a torch optimizer's state_dict()."
            )
        for key in cast("Sequence[Any]", keys):
            if not isinstance(key, int | str):
                raise TypeError(
                    f"{caller}: params of group {index} has a {type(key).__name__}; expected"
                    " numbers, or names. optimizer.state_dict() has them, optimizer.param_groups"
                    " the tensors themselves."
                )
        names = group.get("param_names") or [None] * len(group["params"])
        if not isinstance(names, Sequence) or len(names) != len(group["params"]):
            raise ValueError(
                f"{caller}: group {index} has the param_names {names!r} for"
                f" {len(group['params'])} params; expected a name for each."
            )
        listed += [
            TorchParameter(key, name, index, group, _unwrapped(state.get(key, {})))
            for key, name in zip(group["params"], names, strict=True)
        ]
    keys = [parameter.key for parameter in listed]
    for key, entries in state.items():
        if key not in keys or not isinstance(entries, Mapping):
            raise ValueError(
                f"{caller}: state has a {type(entries).__name__} at {key!r}; expected a mapping for"
                f" each of the groups' params, {', '.join(map(repr, keys))}. (JSON makes strings"
                " of numbers: turn them back.)"
            )
    return listed


def _unwrapped(entries: Any) -> Any:
    """What is kept of a parameter, without the wrapper that bitsandbytes puts codes in."""
    codes = entries.get(_WRAPPER) if isinstance(entries, Mapping) else None
    known = cast("Mapping[str, Any]", entries)
    return {**known, **codes} if isinstance(codes, Mapping) else entries


_WRAPPER = "__bnb_optimizer_quant_state__"


def match(
    caller: str,
    parameters: Sequence[TorchParameter],
    leaves: Sequence[str],
    paths: Any,
) -> dict[str, TorchParameter]:
    """The torch parameter of every leaf, by the leaf's path and in torch's order.

    Raises:
      ValueError: a parameter without a leaf or a leaf without a parameter, or two of either.
    """
    if isinstance(paths, str) or not isinstance(paths, Sequence | Mapping | None):
        raise TypeError(
            f"{caller}: paths is {paths!r}; expected a sequence of paths, or a mapping from torch's"
            " names or numbers to paths."
        )
    if isinstance(paths, Mapping):
        chosen = _chosen_by_name(caller, parameters, cast("Mapping[Any, str | None]", paths))
    else:
        chosen = list(leaves if paths is None else cast("Sequence[str | None]", paths))
        if len(chosen) != len(parameters):
            what = "params has leaves" if paths is None else "paths has entries"
            left = chosen[len(parameters) :] or parameters[len(chosen) :]
            rest = ", ".join(map(str, left[:5])) + (", ..." if len(left) > 5 else "")
            raise ValueError(
                f"{caller}: {what} for {len(chosen)} parameters, expected {len(parameters)} as in"
                f" the state dict; one side alone has {rest}. paths= says which leaf each torch"
                " parameter is, None for one that has none."
            )
    matched: dict[str, TorchParameter] = {}
    for path, parameter in zip(chosen, parameters, strict=True):
        if path is None:
            continue
        if path not in leaves:
            raise ValueError(
                f"{caller}: paths has {path!r} for {parameter}; expected one of the leaves"
                f" {', '.join(leaves)}."
            )
        if path in matched:
            raise ValueError(
                f"{caller}: paths has {path!r} for {matched[path]} and for {parameter}; expected a"
                " leaf for each."
            )
        matched[path] = parameter
    for path in leaves:
        if path not in matched:
            raise ValueError(
                f"{caller}: no torch parameter matches the leaf at {path}; expected one for each"
                " leaf. Add it to paths=, or leave the leaf out of params."
            )
    return matched


def _chosen_by_name(
    caller: str, parameters: Sequence[TorchParameter], paths: Mapping[Any, str | None]
) -> list[str | None]:
    known = {p.key for p in parameters} | {p.name for p in parameters}
    unknown = [key for key in paths if key not in known]
    missing = [p for p in parameters if p.key not in paths and p.name not in paths]
    if unknown or missing:
        wrong = f"has no entry for {missing[0]}" if missing else f"names {unknown[0]!r}"
        raise ValueError(
            f"{caller}: paths {wrong}; expected the path of a leaf, or None, for each of"
            f" {', '.join(p.name or str(p.key) for p in parameters)}."
        )
    return [paths[p.name] if p.name in paths else paths[p.key] for p in parameters]


def array_of(caller: str, what: str, value: Any) -> Array:
    """A tensor or array as a NumPy array, wherever it lies; bfloat16 as float32.

    Raises:
      TypeError: it is sparse, or no array.
    """
    if getattr(value, "is_sparse", False) or "sparse" in str(getattr(value, "layout", "")):
        raise TypeError(
            f"{caller}: {what} is a sparse tensor; expected a dense one. Make it dense with"
            " .to_dense()."
        )
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            value = value.float() if "bfloat16" in str(value.dtype) else value
        array = np.asarray(value)
    except Exception as error:  # torch and NumPy raise any kind; a JAX tracer likewise
        raise TypeError(
            f"{caller}: {what} is a {type(value).__name__} that NumPy cannot read; expected an"
            " array of real numbers, outside jax.jit."
        ) from error
    if array.dtype.kind not in "fiu" and str(array.dtype) != "bfloat16":
        found = describe(value) if hasattr(value, "shape") else repr(value)
        raise TypeError(f"{caller}: {what} is {found}; expected an array of real numbers.")
    return array


def number_of(caller: str, what: str, value: Any) -> float:
    """A number, or a tensor of one, as a Python number.

    Raises:
      TypeError: it is something else, or not finite.
    """
    try:
        number = float("" if isinstance(value, str | bool) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{caller}: {what} is {value!r}; expected a number.") from error
    if not math.isfinite(number):
        raise TypeError(f"{caller}: {what} is {number}; expected a finite number.")
    return number
