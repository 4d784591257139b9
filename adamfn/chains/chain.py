# SPDX-License-Identifier: Apache-2.0
"""`Chain`: stages and transformations, one after another. Neighbouring stages are fused."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, TypeAlias

import jax

from adamfn.backends.primitive import BACKENDS, Backend
from adamfn.chains import segment
from adamfn.chains.contradictions import check_order
from adamfn.chains.leaves import Request, check_call, first_states, way_out
from adamfn.chains.transform import (
    GradientTransformation,
    Transformation,
    apply_updates,
    check_transformation,
    extra_arguments,
    where_updated,
)
from adamfn.core.stage import Stage
from adamfn.trees import PyTree, shown

Structure: TypeAlias = Any
"""A stage, a transformation that is not fused, or a tuple of structures: a chain."""

Moved: TypeAlias = tuple[PyTree, PyTree, PyTree]
"""The updates and the moved parameters, as far as they are wanted, and the next state."""


class Chain:
    """Stages and transformations; its `init` and `update` are a `GradientTransformation`."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self._runs: list[list[Any]] = []
        for fused, group in groupby(self.parts, lambda part: isinstance(part, Stage)):
            parts = list(group)
            self._runs += [parts] if fused else [[part] for part in parts]

    @property
    def transformation(self) -> GradientTransformation:
        """The chain as a `GradientTransformation`."""
        return GradientTransformation(self.init, self.update)

    @property
    def parts(self) -> list[Any]:
        """Its stages, and the transformations that are not fused with them, in their order."""
        return elements(self.structure)

    @property
    def stages(self) -> list[Stage]:
        """All its stages in their order, those of wrapped chains included."""
        return stages_of(self.structure)

    @property
    def takes(self) -> frozenset[str] | None:
        """The extra arguments of `update` that some part takes; None for any."""
        taken = [
            {*part.takes} - {"grads"} if isinstance(part, Stage) else extra_arguments(part.update)
            for part in unwrapped(self.structure)
        ]
        return None if None in taken else frozenset[str]().union(*filter(None, taken))

    def init(self, params: PyTree) -> PyTree:
        """The state before the first step."""
        states: list[PyTree] = []
        for parts in self._runs:
            own = isinstance(parts[0], Stage)
            states += first_states(parts, params) if own else [parts[0].init(params)]
        return nested(self.structure, iter(states))

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        """The transformed updates, and the next state."""
        check_call("update(updates, state, params)", updates, state, params)
        request = Request(where_updated(params, updates), extra)
        updates, _, state = self.advance(updates, state, request)
        return updates, state

    def advance(self, updates: PyTree, state: PyTree, request: Request) -> Moved:
        """One step, of `update` or of `step`."""
        states, next_states = flat_states(self.structure, state), list[PyTree]()
        moved, decays = None, request.decays
        for parts in self._runs:
            last = parts is self._runs[-1]
            now = request if last else request._replace(updates=True, moves=False)
            now = now._replace(decays=decays)
            old = states[len(next_states) :][: len(parts)]
            if isinstance(parts[0], Stage):
                updates, moved, new = segment.run(parts, updates, old, now)
            elif (inner := chain_of(parts[0])) is not None:
                updates, moved, *new = inner.advance(updates, old[0], now)
            else:
                update, moved = parts[0].update, None
                takes = extra_arguments(update)
                known = {k: x for k, x in request.extra.items() if takes is None or k in takes}
                updates, *new = update(updates, old[0], request.params, **known)
            next_states += new
            for stage in stages_of(tuple(parts)):
                decays = stage.decays or decays
        if request.moves and moved is None:
            moved = apply_updates(request.params, updates)
        return updates, moved, nested(self.structure, iter(next_states))


class Wrapped(Chain):
    """A chain inside a wrapper of ours: it has the same stages, and is not fused with others."""

    def __init__(self, inner: Chain, **changes: Any) -> None:
        super().__init__(inner.structure)
        self.inner = inner
        self._changes = changes  # of the requests to the chain inside

    def init(self, params: PyTree) -> PyTree:
        """The state of the chain inside."""
        return self.inner.init(params)

    def advance(self, updates: PyTree, state: PyTree, request: Request) -> Moved:
        """One step of the chain inside."""
        return self.inner.advance(updates, state, self.adjusted(request, updates))

    def adjusted(self, request: Request, updates: PyTree) -> Request:
        """What is asked of the chain inside."""
        return request._replace(**self._changes)


def chain_of(tx: Any) -> Chain | None:
    """The chain that a transformation of ours is made of; None for any other."""
    chain = getattr(getattr(tx, "update", None), "__self__", None)
    return chain if isinstance(chain, Chain) else None


def from_stage(stage: Stage) -> GradientTransformation:
    """The transformation of one stage, fused with its neighbours in a `chain`.

    Its state has the stage's type, with a field `count` if the stage stands alone. A formula that
    closes over values is traced again for each transformation made with it; use a function of a
    module, and pass the values as scalars. What is not a `Stage` raises a TypeError.

    >>> import adamfn, jax.numpy as jnp
    >>> def agree(u, g):
    ...     return jnp.where(u * g > 0, u, 0)
    >>> where_they_agree = adamfn.from_stage(adamfn.Stage("agree", agree, reads=("grads",)))
    >>> tx = adamfn.chain(adamfn.scale_by_moments(b1=0.5), where_they_agree)
    >>> _, state = tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))
    >>> print(tx.update(jnp.array([-1.0]), state)[0])
    [0.]
    """
    if not isinstance(stage, Stage):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"from_stage: the argument is {shown(stage)}; expected an adamfn.Stage.")
    return Chain(stage).transformation


def chain(*transformations: Transformation) -> GradientTransformation:
    """Applies transformations one after another: `chain(f, g)` maps updates `u` to `g(f(u))`.

    Neighbouring adamfn stages, in nested chains too, are fused: one program of a leaf applies all
    of them, and nothing is rounded or written to memory in between. `step` moves the parameters at
    the end of that program.

    The transformations are ours and optax's, in any order; none at all gives the identity. The
    state is the tuple of their states. Fused stages share one count. Each extra argument of
    `update`, such as `learning_rate=`, goes to every transformation that takes it.

    Raises TypeError if an argument has no `init` and `update`, and ValueError if stages contradict
    one another, such as two weight decays; at `update`, if the state has another number of parts.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.chain(adamfn.add_decayed_weights(0.5), adamfn.scale_by_lr(0.5))
    >>> params = jnp.array([1.0, 2.0])
    >>> print(tx.update(jnp.zeros(2), tx.init(params), params)[0])
    [-0.25 -0.5 ]
    """
    for position, tx in enumerate(transformations):
        check_transformation(f"chain: argument {position}", tx)
    structure = tuple(
        tx if own is None or isinstance(own, Wrapped) else own.structure
        for own, tx in zip(map(chain_of, transformations), transformations, strict=True)
    )
    check_order(elements(structure), list(unwrapped(structure)))
    return Chain(structure).transformation


def with_backend(tx: GradientTransformation, backend: Backend) -> GradientTransformation:
    """The same transformation, run by a given backend.

    Args:
      tx: a recipe, a chain of stages, or what `packed` made of one.
      backend: `"auto"`, the fastest one on each platform; `"xla"`, no native code and no kernel;
        `"pallas"`, Pallas kernels even where XLA makes one kernel by itself, and interpreted (which
        is slow) on CPU; or `"mosaic_gpu"`, these, on GPUs of compute capability 9.0 and later those
        by Mosaic in place of Triton.

    Returns:
      A `GradientTransformation` with the same state. In a `chain` it is not fused with others.

    Raises:
      ValueError: an unknown backend, or a transformation of another library.

    >>> import adamfn
    >>> tx = adamfn.with_backend(adamfn.adam(), "xla")
    """
    if backend not in BACKENDS:
        raise ValueError(f"with_backend: backend is {shown(backend)}; expected one of {BACKENDS}.")
    check_transformation("with_backend: the first argument", tx)
    inner = chain_of(tx)
    if inner is None:
        raise ValueError(f"with_backend: found {shown(tx)}; expected a transformation of adamfn's.")
    return Wrapped(inner, backend=backend).transformation


def elements(structure: Structure) -> list[Any]:
    """The stages and transformations of a structure, in their order."""
    return jax.tree.leaves(structure, is_leaf=_is_element)


def unwrapped(structure: Structure) -> Iterator[Any]:
    """The same, with the stages of wrapped chains in place of their wrappers."""
    for part in elements(structure):
        inner = chain_of(part)
        yield from [part] if inner is None else unwrapped(inner.structure)


def stages_of(structure: Structure) -> list[Stage]:
    """All stages of a structure, those of wrapped chains included."""
    return [part for part in unwrapped(structure) if isinstance(part, Stage)]


def nested(structure: Structure, states: Iterator[PyTree]) -> PyTree:
    """The state of a structure, from the states of its elements."""
    return jax.tree.unflatten(jax.tree.structure(structure, is_leaf=_is_element), states)


def flat_states(structure: Structure, state: PyTree) -> list[PyTree]:
    """The states of a structure's elements: the inverse of `nested`. Raises as `chain` says."""
    if _is_element(structure):
        return [state]
    states: Any = state if isinstance(state, tuple) else None
    if states is None or len(states) != len(structure):
        found = f"a {type(state).__name__}" if states is None else f"a tuple of {len(states)}"
        raise ValueError(
            f"chain: found {found} as the state, expected a tuple of {len(structure)}, one part for"
            f" each transformation. {way_out(state if states is None else None, 'chain')}"
        )
    return [flat for pair in zip(structure, states, strict=True) for flat in flat_states(*pair)]


def _is_element(part: Structure) -> bool:
    return type(part) is not tuple
