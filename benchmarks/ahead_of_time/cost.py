# SPDX-License-Identifier: Apache-2.0
"""What a step of an optimizer costs, read from the compiled program."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding

from .machines import Machine
from .traffic import traffic

Step = Callable[[Any, Any, Any], tuple[Any, Any]]
"""From parameters, state and gradients to the next parameters and state."""


class Cost(NamedTuple):
    """On each chip, in bytes where nothing else is said."""

    moved: int
    """Read from and written to device memory."""
    least: int
    """Parameters, state and gradients, each read once, and the former two written once."""
    arguments: int
    """Parameters, state and gradients; results take their places."""
    state: int
    temporary: int
    kernels: int
    """Those that move more than a MiB."""
    launches: int
    """Kernels of every size, transfers and collectives."""
    collectives: dict[str, int]
    collected: int
    """What collectives leave on a chip."""
    seconds: float
    """To trace, to lower and to compile: of the clock, or of the processors if they are shared."""


def cost(step: Step, params: Any, state: Any, grads: Any, machine: Machine) -> Cost:
    """Compiles a step with parameters and state donated, and reads what it costs.

    Args:
      step: from parameters, state and gradients to the next parameters and state.
      params: shapes and dtypes with the shardings that they have before and after.
      state: likewise.
      grads: likewise; they are not donated.
      machine: for whose compiler.
    """
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)
    clocks = time.perf_counter, time.process_time
    begin = [clock() for clock in clocks]
    with _named(machine, params):
        lowered = jitted.lower(params, state, grads)
    compiled = lowered.compile(compiler_options=machine.compiler_options)
    seconds = min(clock() - start for clock, start in zip(clocks, begin, strict=True))
    memory: Any = compiled.memory_analysis()
    found = traffic(compiled.as_text())
    kept, given = size(params) + size(state), size(grads)
    return Cost(
        moved=found.moved,
        least=2 * kept + given,
        arguments=memory.argument_size_in_bytes,
        state=size(state),
        temporary=memory.temp_size_in_bytes,
        kernels=found.kernels,
        launches=found.launches,
        collectives=dict(found.collectives),
        collected=found.collected,
        seconds=seconds,
    )


def _named(machine: Machine, params: Any) -> Any:
    """Names the device to Pallas, where one chip compiles for itself; a mesh names its devices."""
    alone = all(isinstance(x.sharding, SingleDeviceSharding) for x in jax.tree.leaves(params))
    if machine.platform == "cpu" or not alone:
        return nullcontext()
    chip = jax.sharding.Mesh(machine.devices[:1], ("chip",))
    return jax.sharding.use_abstract_mesh(chip.abstract_mesh)


def size(tree: Any) -> int:
    """Bytes of a tree on each device, without padding."""
    leaves = jax.tree.leaves(tree)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )


def on(shardings: Any, tree: Any) -> Any:
    """Shapes and dtypes with a sharding for each, or one for all."""
    if isinstance(shardings, jax.sharding.Sharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, tree)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def one_chip(machine: Machine) -> SingleDeviceSharding:
    """The first of a machine's chips."""
    return SingleDeviceSharding(machine.devices[0])
