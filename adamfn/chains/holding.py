"""A step that is not taken: what a stage that holds the others back leaves as it was."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adamfn.core.stage import CountedState, Stage
from adamfn.trees import PyTree


def held_back(
    stages: Sequence[Stage], old: Sequence[PyTree], new: Sequence[PyTree], scalars: Sequence[Any]
) -> list[PyTree]:
    """The next states, where counts and what is remembered stay as they were in a step not taken.

    What is kept of leaves stays by the leaves' programs. A stage that holds the others back counts
    and remembers all steps.

    Args:
      stages: the joined stages.
      old: their states before the step.
      new: their states after it.
      scalars: the scalars of each.
    """
    states = list(new)
    for holder, (taken,) in ((k, scalars[k]) for k, stage in enumerate(stages) if stage.holds):
        for k, stage in enumerate(stages):
            if k != holder:
                states[k] = _held(old[k], states[k], taken, {*stage.keeps, "scales"})
            elif isinstance(states[k], CountedState):
                states[k] = _held(old[k], states[k], taken, {"stage"})
    return states


def _held(old: Any, new: Any, taken: jax.Array, apart: set[str]) -> Any:
    """A state with the fields of another where the step is not taken, but for some."""
    taken = jnp.asarray(taken, jnp.float32) > 0
    fields: dict[str, Any] = {}
    for name in new._fields:
        if name == "stage" and isinstance(new, CountedState) and name not in apart:
            fields[name] = _held(old.stage, new.stage, taken, apart)
        elif name not in apart:
            fields[name] = jnp.where(taken, getattr(new, name), getattr(old, name))
    return new._replace(**fields)
