"""How transformations are made of stages, and chained: joined stages are one program of a leaf."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any, TypeAlias, cast

from adamfn.backends.primitive import BACKENDS, Backend
from adamfn.chains import segment as joined
from adamfn.chains.contradictions import check_order
from adamfn.chains.segment import Wanted
from adamfn.chains.step import assemble, own_of
from adamfn.chains.transform import (
    GradientTransformation,
    Transformation,
    apply_updates,
    check_transformation,
    extra_arguments,
)
from adamfn.core.stage import Stage
from adamfn.trees import PyTree

Structure: TypeAlias = Any
"""A stage, a transformation that is not ours, or a tuple of structures: a chain."""


def from_stage(stage: Stage) -> GradientTransformation:
    """The transformation of one stage.

    Args:
      stage: the stage. A formula that closes over values of its own is traced again for each
        transformation made with it; let it be a function of a module, and pass them as scalars.

    Returns:
      A `GradientTransformation`. In a `chain` it is joined with its neighbours. Its state has the
      stage's type; if that does not count the steps, it is inside a `CountedState`.

    Raises:
      TypeError: it is not a `Stage`.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> def agree(u, g):
    ...     return jnp.where(u * g > 0, u, 0)
    >>> where_they_agree = adamfn.from_stage(adamfn.Stage("agree", agree, reads=("grads",)))
    >>> tx = adamfn.chain(adamfn.scale_by_moments(b1=0.5), where_they_agree)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (4.0, -1.0):
    ...     updates, state = tx.update(jnp.array([g]), state)
    >>> print(updates)
    [0.]
    """
    if not isinstance(stage, Stage):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"from_stage: the argument is {stage!r}; expected an adamfn.Stage.")
    return _compose(stage)


def chain(*transformations: Transformation) -> GradientTransformation:
    """Applies transformations one after another: `chain(f, g)` maps updates `u` to `g(f(u))`.

    Neighbouring stages of ours, in nested chains too, are joined: one program of a leaf applies
    them all, and nothing is rounded or written to memory between them. `step` moves the parameters
    at the program's end.

    The state is the tuple of their states. Joined stages count their steps once. Every extra
    argument of `update`, such as `learning_rate=`, goes to each transformation that takes it.

    Args:
      *transformations: ours and optax's, in any mixture; none at all gives the identity.

    Returns:
      A `GradientTransformation`.

    Raises:
      TypeError: an argument has no `init` and `update`.
      ValueError: stages that contradict one another, such as two weight decays; at `update`, the
        state has another number of parts than the chain.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.chain(adamfn.scale_by_lr(0.5), adamfn.scale_by_lr(0.5))
    >>> params = jnp.array([1.0, 2.0])
    >>> updates, state = tx.update(params, tx.init(params))
    >>> print(updates)
    [0.25 0.5 ]
    """
    for position, tx in enumerate(transformations):
        check_transformation(f"chain: argument {position}", tx)
    structure = tuple(map(structure_of, transformations))
    check_order(list(elements(structure)))
    return _compose(structure)


def with_backend(tx: GradientTransformation, backend: Backend) -> GradientTransformation:
    """The same transformation, run by a backend of choice.

    Args:
      tx: a recipe, a chain of stages, or what `packed` made of one.
      backend: `"auto"`, the fastest known where it is lowered; `"xla"`, no native code and no
        kernel; or `"pallas"`, Pallas kernels also where XLA makes one kernel by itself, and on CPU
        interpreted, which is slow.

    Returns:
      A `GradientTransformation` with the same state. In a `chain` it is not joined with others.

    Raises:
      ValueError: an unknown backend, or a transformation of another library.

    >>> import adamfn
    >>> tx = adamfn.with_backend(adamfn.adam(), "xla")
    """
    if backend not in BACKENDS:
        raise ValueError(f"with_backend: backend is {backend!r}; expected one of {BACKENDS}.")
    check_transformation("with_backend: the first argument", tx)
    own = own_of(tx)
    if own is None:
        raise ValueError(f"with_backend: found {tx!r}; expected a transformation of adamfn's.")

    def advance(
        updates: PyTree, state: PyTree, params: PyTree, extra: Mapping[str, Any], wanted: Wanted
    ) -> tuple[PyTree, PyTree, PyTree]:
        return own.advance(updates, state, params, extra, wanted._replace(backend=backend))

    return assemble(tx.init, advance, own.takes, made_of=structure_of(tx))


def _compose(structure: Structure) -> GradientTransformation:
    """The transformation that a structure stands for."""
    segments = list(_segments(elements(structure)))
    accepted = [extra_arguments(own[0].update) if foreign else None for foreign, own in segments]

    def init(params: PyTree) -> PyTree:
        states: list[PyTree] = []
        for foreign, own in segments:
            states += [own[0].init(params)] if foreign else joined.first_states(own, params)
        return nested(structure, iter(states))

    def advance(
        updates: PyTree, state: PyTree, params: PyTree, extra: Mapping[str, Any], wanted: Wanted
    ) -> tuple[PyTree, PyTree, PyTree]:
        states, next_states = flat_states(structure, state), list[PyTree]()
        moved: PyTree = None
        for place, ((foreign, own), takes) in enumerate(zip(segments, accepted, strict=True)):
            last = place == len(segments) - 1
            parts = states[len(next_states) :][: len(own)]
            if not foreign:
                now = wanted if last else wanted._replace(updates=True, params=False)
                updates, moved, parts = joined.run(own, updates, parts, params, extra, now)
            else:
                known = extra if takes is None else {k: v for k, v in extra.items() if k in takes}
                inner = own_of(own[0]) if last and wanted.params else None
                if inner is None:
                    updates, part = own[0].update(updates, *parts, params, **known)
                else:
                    updates, moved, part = inner.advance(updates, *parts, params, known, wanted)
                parts = [part]
            next_states += parts
        if wanted.params and moved is None:
            moved = apply_updates(params, updates)
        return updates, moved, nested(structure, iter(next_states))

    takes: frozenset[str] | None = frozenset()
    for (foreign, own), keywords in zip(segments, accepted, strict=True):
        inner = own_of(own[0]) if foreign else None
        names = inner.takes if inner else keywords
        names = names if foreign else {name for stage in own for name in stage.takes}
        takes = None if takes is None or names is None else takes.union(names)
    return assemble(init, advance, takes, structure)


def structure_of(tx: Transformation) -> Structure:
    """The stages that a transformation is made of, or the transformation itself."""
    own = own_of(tx)
    return tx if own is None or own.structure is None else own.structure


def elements(structure: Structure) -> Iterator[Any]:
    """The stages and transformations of a structure, in their order."""
    if type(structure) is tuple:
        for part in cast("tuple[Any, ...]", structure):
            yield from elements(part)
    else:
        yield structure


def _segments(elements: Iterator[Any]) -> Iterator[tuple[bool, list[Any]]]:
    """Runs of stages, and single transformations that are not ours; these with True."""
    for foreign, run in groupby(elements, lambda element: not isinstance(element, Stage)):
        if foreign:
            yield from ((True, [tx]) for tx in run)
        else:
            yield False, list(run)


def nested(structure: Structure, states: Iterator[PyTree]) -> PyTree:
    """The state of a structure, from the states of its elements."""
    if type(structure) is tuple:
        return tuple(nested(part, states) for part in cast("tuple[Any, ...]", structure))
    return next(states)


def flat_states(structure: Structure, state: PyTree) -> list[PyTree]:
    """The states of a structure's elements: the inverse of `nested`.

    Raises:
      ValueError: the state has another number of parts.
    """
    if type(structure) is not tuple:
        return [state]
    parts = cast("tuple[Any, ...]", structure)
    if isinstance(state, tuple) and len(state) == len(parts):  # pyright: ignore[reportUnknownArgumentType]
        own = cast("tuple[PyTree, ...]", state)
        return [
            flat
            for part, inner in zip(parts, own, strict=True)
            for flat in flat_states(part, inner)
        ]
    is_tuple = isinstance(state, tuple)
    found = f"a tuple of {len(state)}" if is_tuple else f"a {type(state).__name__}"  # pyright: ignore[reportUnknownArgumentType]
    raise ValueError(
        f"chain: found {found} as the state, expected a tuple of {len(parts)}, one part for each"
        f" transformation. {joined.way_out(None if is_tuple else state, 'chain')}"
    )
