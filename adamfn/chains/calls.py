"""Calls of programs: the program of every leaf, which leaves share a call, and how it is made."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adamfn.backends.primitive import Backend, bind
from adamfn.backends.shards import Shards, run_on_shards
from adamfn.backends.xla import run_call
from adamfn.core.bundle import Bundle
from adamfn.core.leaf import Kept
from adamfn.core.program import Call, Part, Program
from adamfn.core.stage import Stage
from adamfn.core.varying import axes_of
from adamfn.formats import Format
from adamfn.trees import PyTree, real_dtype, wide_dtype

LARGE = 2**18
"""Leaves from here on are called alone: they outweigh the microseconds of a call."""

_LEAVES = 16
"""Smaller leaves that share a call."""


def leaf_programs(
    stages: Sequence[Stage],
    formats: Sequence[Sequence[Format | None]],
    masks: Sequence[Sequence[bool]],
    stacked: Sequence[Sequence[bool]],
    scalars: PyTree,
    grads: Sequence[Any],
    params: Sequence[Any],
    kept: Sequence[Any],
    *,
    returns: bool,
    moves: bool,
) -> list[Program]:
    """The program of every leaf.

    Args:
      stages: the stages that are joined.
      formats: of each stage, the format of every leaf.
      masks: of each stage, whether it changes each leaf.
      stacked: of each stage, whether each leaf holds layers along its first axis.
      scalars: what the stages need at this step; its structure counts.
      grads: the gradient of every leaf.
      params: its parameter, or None.
      kept: what is kept of it.
      returns: whether the program returns the update.
      moves: whether it moves the parameter.

    Raises:
      ValueError: a stage reads moments that no stage before it keeps.
    """
    structure = jax.tree.structure(scalars)
    known: dict[Any, Program] = {}
    programs: list[Program] = []
    columns = zip(formats, masks, stacked, strict=True)
    rows = zip(*(zip(*own, strict=True) for own in columns), strict=True)
    for g, p, own, of_stages in zip(grads, params, kept, rows, strict=True):
        rounds = any(
            "stored" in stage.reads and active
            for stage, (_, active, _) in zip(stages, of_stages, strict=True)
        )
        dtype = jnp.dtype(jnp.float32) if rounds else _update_dtype(g, p)
        key = _computed_in(g, p, own), dtype if returns else None, of_stages
        if key not in known:
            parts = tuple(
                Part(
                    stage.name,
                    stage.formula,
                    tuple(stage.reads),
                    tuple(stage.keeps),
                    format,
                    stage.rests,
                    stage.elementwise,
                    active,
                    layered,
                    stage.holds,
                    stage.whole,
                    stage.mean,
                )
                for stage, (format, active, layered) in zip(stages, of_stages, strict=True)
            )
            _check_reads(parts)
            known[key] = Program(parts, structure, key[0], moves, key[1])
        programs.append(known[key])
    return programs


def _check_reads(parts: Sequence[Part]) -> None:
    """Checks that what formulas read is known by then."""
    known = {"params", "grads", "noise", "stored"}
    for part in parts:
        if not part.active:
            continue
        for name in part.reads:
            if name not in known:
                raise ValueError(
                    f"{part.name}: it reads {name}, which no stage of ours just before it keeps;"
                    " expected one that does, such as scale_by_moments, earlier in the same chain."
                )
        known |= {*part.keeps}


def _update_dtype(g: Any, p: Any) -> Any:
    """An update has its gradient's dtype, but float16 would lose the small ones of wider params."""
    if g.dtype == jnp.float16 and getattr(p, "dtype", None) != jnp.float16:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(g.dtype)


def _computed_in(*arrays: Any) -> Any:
    """The real dtype that a leaf's program computes in: the widest, and float32 at least."""
    dtypes = {x.dtype for x in jax.tree.leaves(arrays) if hasattr(x, "dtype")}
    inexact = [real_dtype(wide_dtype(x)) for x in dtypes if jnp.issubdtype(x, jnp.inexact)]
    return max(inexact, key=lambda dtype: dtype.itemsize)


def together(
    programs: Sequence[Program],
    grads: Sequence[Any],
    params: Sequence[Any],
    kept: Sequence[Any],
    backend: Backend,
    shards: Sequence[Shards | None],
) -> list[list[int]]:
    """The leaves of each call, by their numbers: alike in all but shape, and large ones alone."""
    most = 1 if backend == "pallas" else _LEAVES
    alike: dict[Any, list[int]] = {}
    for k, (program, g, p) in enumerate(zip(programs, grads, params, strict=True)):
        dtypes = g.dtype, getattr(p, "dtype", None)
        # Outside jit, the arrays of one call must lie on the same devices.
        place = None if isinstance(g, Tracer) else getattr(g, "sharding", None)
        # Inside shard_map, what one of them varies over all results of the call do.
        alone = k if g.size >= LARGE or isinstance(g, Bundle) else None
        arrays = [] if alone is not None else jax.tree.leaves((g, p, kept[k]))
        varies = frozenset(map(axes_of, arrays))
        alike.setdefault((program, dtypes, place, varies, shards[k], alone), []).append(k)
    # Leaves of one shape beside one another: calls of one signature are traced once.
    ordered = (sorted(own, key=lambda k: grads[k].shape) for own in alike.values())
    return [own[i : i + most] for own in ordered for i in range(0, len(own), most)]


class Vectors:
    """The scalars of a step in one array, for each dtype that leaves are computed in."""

    def __init__(self, scalars: PyTree) -> None:
        self._scalars = jax.tree.leaves(scalars)
        self._made: dict[Any, jax.Array] = {}

    def __getitem__(self, dtype: Any) -> jax.Array:
        """The vector in a real dtype."""
        if dtype not in self._made:
            arrays = [jnp.asarray(scalar, dtype) for scalar in self._scalars]
            self._made[dtype] = jnp.stack(arrays) if arrays else jnp.zeros((0,), dtype)
        return self._made[dtype]


def run_all(
    programs: Sequence[Program],
    backend: Backend,
    scalars: PyTree,
    count: jax.Array,
    kept: Sequence[Any],
    grads: Sequence[Any],
    params: Sequence[Any],
    shards: Sequence[Shards | None],
) -> tuple[list[Any], list[Any], list[Any]]:
    """Runs the program of every leaf: what is kept, and updates and parameters, or None each."""
    vectors, columns = Vectors(scalars), ([*kept], [None] * len(grads), [None] * len(grads))
    for numbers in together(programs, grads, params, kept, backend, shards):
        results = _run_call(
            programs[numbers[0]],
            backend,
            vectors,
            count,
            numbers,
            [kept[k] for k in numbers],
            [grads[k] for k in numbers],
            [params[k] for k in numbers if params[k] is not None],
            shards[numbers[0]],
        )
        for column, values in zip(columns, results, strict=True):
            for k, value in zip(numbers, values, strict=False):
                column[k] = value
    return columns


def _run_call(
    program: Program,
    backend: Backend,
    vectors: Vectors,
    count: jax.Array,
    numbers: Sequence[int],
    kept: Sequence[Sequence[Kept]],
    grads: Sequence[Any],
    params: Sequence[Any],
    shards: Shards | None,
) -> tuple[list[list[Kept]], Sequence[Any], Sequence[Any]]:
    """Runs a program on some leaves: what is kept, and the updates and parameters it returns."""
    bundle = grads[0] if isinstance(grads[0], Bundle) else None
    if bundle is not None:
        grads = [g if g.dtype == bundle.dtype else g.astype(bundle.dtype) for g in bundle]
        params = [p for own in params for p in own]
        numbers = [numbers[0]] * len(grads)
    call = Call(program, len(grads), jax.tree.structure(kept), packed=bundle is not None)
    of_whole_leaves = np.array([[number, 0] for number in numbers], np.uint32)
    arrays = [of_whole_leaves, *jax.tree.leaves(kept), *grads, *params]
    operands = [vectors[program.dtype], count, *arrays]
    if not program.known:
        jax.eval_shape(partial(run_call, call), *operands)  # mistakes show now, not when it lowers
    results = _run(call, backend, shards, operands)
    own = jax.tree.unflatten(call.kept, results[: call.arrays_kept])
    moved = results[call.arrays_kept :]
    split = call.leaves if program.update_dtype is not None else 0
    us, ps = moved[:split], moved[split:]
    if bundle is None:
        return own, us, ps
    us = [
        u if g.dtype in (u.dtype, jnp.float16) else u.astype(g.dtype)
        for u, g in zip(us, bundle, strict=False)
    ]
    return own, [Bundle(us)], [Bundle(ps)]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    call: Call, backend: Backend, shards: Shards | None, operands: list[jax.Array]
) -> list[jax.Array]:
    if shards is None:
        return bind(call, backend, operands)
    return run_on_shards(call, backend, shards, operands)
