"""Checking that a state is the one its transformation made."""

from typing import TypeVar

from adamfn.trees import PyTree

State = TypeVar("State")


def check_state(name: str, state: PyTree, expected: type[State]) -> State:
    """Returns `state` if it is an `expected`.

    Raises:
      TypeError: it is something else; `name` is the transformation that found it.
    """
    if isinstance(state, expected):
        return state
    raise TypeError(
        f"{name}: found a state of type {type(state).__name__}, expected {expected.__name__}. The"
        " state belongs to another transformation: make it with this one's init(params)."
    )
