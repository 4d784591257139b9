"""A pickle is a program. This interpreter runs the instructions that data need, and no others.

What the program names is compared with a few names, and never looked up or called.
"""

import math
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from adamfn.interop.torch.parameters import Array

_FLOATS = {"Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": jnp.bfloat16, "Bool": "?"}
_INTEGERS = {"Long": "i8", "Int": "i4", "Short": "i2", "Char": "i1", "Byte": "u1"}
_DTYPES = {f"torch.{kind}Storage": np.dtype(x) for kind, x in (_FLOATS | _INTEGERS).items()}
_CALLS = {
    *("collections.OrderedDict", "torch.Size"),
    *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"),
}
_PUSHED = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
"""Instructions that push their argument."""
_CONSTANTS: dict[str, Callable[[], Any]] = {
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
    **{"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict},
}
_KEYS = (int, str, float, bool, bytes, type(None))
_DEPTH, _SIZE = 100, 10**7
"""How deep containers may be nested; how many elements there may be, repeated ones repeatedly."""


class _Name(str):
    """The name of a class or a function."""


def unpickled(pickle: bytes, read: Callable[[str, np.dtype[Any], int], Array]) -> Any:
    """What a pickle of `torch.save` describes.

    Args:
      pickle: the pickle.
      read: returns a storage, from its key, dtype and number of elements.

    Raises:
      Exception: any kind; a ValueError's message says what was found.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks below each mark
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(pickle):
        name = opcode.name
        if name in _PUSHED:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name == "MARK":
            below.append(stack)
            stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            stack, items = below.pop(), stack
            _add(stack, items, name)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "SETITEM"):
            items = _popped(stack, {"D": 1, "M": 2}.get(name[-1]) or int(name[-1]))
            _add(stack, items, name)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            named = _Name(".".join(argument.split(" ") if argument else _popped(stack, 2)))
            if named not in _CALLS | _DTYPES.keys():
                raise ValueError(f"a {named:.100}")
            stack.append(named)
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop(), read))
        elif name == "REDUCE":
            stack.append(_result(*_popped(stack, 2)))
        elif name == "BUILD":  # a module's state_dict() has its versions as attributes
            stack.pop()
            if not isinstance(stack[-1], OrderedDict):
                raise ValueError("attributes of an object")
        elif name == "STOP":
            _measure(stack[-1])
            return stack[-1]
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"the pickle instruction {name}")


def _popped(stack: list[Any], number: int) -> list[Any]:
    items = [stack.pop() for _ in range(number)]
    return items[::-1]


def _add(stack: list[Any], items: list[Any], name: str) -> None:
    """Pushes a tuple of items, or puts them into the list or dict on the stack."""
    if name.startswith("TUPLE"):
        stack.append(tuple(items))
    elif name.startswith("APPEND") and type(stack[-1]) is list:
        stack[-1].extend(items)
    elif name.startswith("SETITEM") and isinstance(stack[-1], dict):
        keys = items[::2]
        if not all(type(key) in _KEYS for key in keys):
            raise ValueError("a key that is neither a number nor text")
        stack[-1].update(zip(keys, items[1::2], strict=True))
    else:
        raise ValueError(f"{name} of a {type(stack[-1]).__name__}")


def _storage(identity: Any, read: Callable[..., Array]) -> Array:
    match identity:
        case ("storage", _Name() as kind, str() as key, _, int() as count) if kind in _DTYPES:
            return read(key, _DTYPES[kind], count)
        case _:
            raise ValueError("a storage that is not described as torch does")


def _result(name: Any, arguments: Any) -> Any:
    """What a call returns in torch."""
    match name, arguments:
        case "collections.OrderedDict", ():
            return OrderedDict[Any, Any]()
        case "torch.Size", (tuple() as shape,):
            return shape
        case "torch._utils._rebuild_parameter", (np.ndarray() as data, _, _):
            return data
        case (
            "torch._utils._rebuild_tensor_v2",
            (np.ndarray() as storage, int() as offset, tuple() as shape, tuple() as strides, *more),
        ) if not any(more[2:]):
            return _tensor(storage, offset, shape, strides)
        case _:
            raise ValueError(f"{name!s:.100} with other arguments than torch's")


def _tensor(storage: Array, offset: int, shape: Sequence[Any], strides: Sequence[Any]) -> Array:
    sizes = (offset, *shape, *strides)
    fits = len(shape) == len(strides) and all(type(n) is int and n >= 0 for n in sizes)
    if fits and 0 in shape:
        return np.empty(shape, storage.dtype)
    if fits:
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        fits = last < storage.size and math.prod(shape) <= storage.size
    if not fits:
        raise ValueError(
            f"a tensor of the shape {shape!r:.100}, strides {strides!r:.100} and offset {offset} in"
            f" a storage of {storage.size} elements"
        )
    steps = [stride * storage.itemsize for stride in strides]
    return np.ndarray(shape, storage.dtype, storage, offset * storage.itemsize, steps)


def _measure(result: Any) -> None:
    """Checks that walks over the result end, such as those of `jax.tree`."""
    known: dict[int, tuple[int, int]] = {}

    def measured(node: Any, depth: int) -> tuple[int, int]:
        if isinstance(node, _Name):
            raise ValueError(f"{node} by itself")
        if not isinstance(node, dict | list | tuple):
            return 0, 1
        if depth <= _DEPTH and id(node) not in known:
            parts = node.values() if isinstance(node, dict) else node
            inner = [(0, 0), *(measured(part, depth + 1) for part in parts)]
            known[id(node)] = 1 + max(h for h, _ in inner), 1 + sum(n for _, n in inner)
        height, size = known.get(id(node), (depth, 0))
        if height > _DEPTH or size > _SIZE:
            raise ValueError(f"containers in {_DEPTH} others, or with {_SIZE} elements")
        return height, size

    measured(result, 0)
