"""Gradient transformations: how they are made of stages, chained, stepped and applied.

Nothing here knows of Adam.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import groupby
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, cast

import chex
import jax
import jax.numpy as jnp

from adamfn import joined
from adamfn.backends.primitive import BACKENDS, Backend
from adamfn.joined import Wanted
from adamfn.rounding import add_stochastically
from adamfn.stage import Stage
from adamfn.trees import PyTree, check_inexact, matching_leaves


class UpdateFunction(Protocol):
    """The type of `GradientTransformation.update`."""

    def __call__(
        self, updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        """Returns the transformed updates and the next state."""
        ...


class GradientTransformation(NamedTuple):
    """A pair of pure functions that turn gradients into updates.

    `init(params)` makes the state; `update(updates, state, params=None, **extra)` returns the
    transformed updates, with the structure, shapes and dtypes of what came in, and the next state.
    Extra arguments that a transformation does not know are ignored.

    Optax accepts it wherever it accepts its own, and the reverse. Only `optax.chain` drops the
    extra arguments of what is not its own class: `optax.GradientTransformationExtraArgs(*tx)`
    gives it that class.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> def update(updates, state, params=None, **extra):
    ...     return updates * 2, state
    >>> double = adamfn.GradientTransformation(init=lambda params: (), update=update)
    >>> updates, state = double.update(jnp.array([1.0]), double.init(jnp.array([0.0])))
    >>> print(updates)
    [2.]
    """

    init: Callable[[PyTree], PyTree]
    update: UpdateFunction


class Transformation(Protocol):
    """What can be chained: ours, optax's, or any object with these two methods."""

    @property
    def init(self) -> Callable[..., Any]:
        """Makes the state from the parameters."""
        ...

    @property
    def update(self) -> Callable[..., Any]:
        """Turns updates and state into the next updates and state."""
        ...


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
      ValueError: at `update`, the state has another number of parts than the chain.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.chain(adamfn.scale_by_lr(0.5), adamfn.scale_by_lr(0.5))
    >>> params = jnp.array([1.0, 2.0])
    >>> updates, state = tx.update(params, tx.init(params))
    >>> print(updates)
    [0.25 0.5 ]
    """
    for position, tx in enumerate(transformations):
        if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
            raise TypeError(
                f"chain: argument {position} is {tx!r}; expected a transformation with `init` and"
                " `update`. Call the factory first: adamfn.adam(), not adamfn.adam."
            )
    return _compose(tuple(map(structure_of, transformations)))


def with_backend(tx: GradientTransformation, backend: Backend) -> GradientTransformation:
    """The same transformation, run by a backend of choice.

    Args:
      tx: a transformation made of stages, such as a recipe.
      backend: `"auto"`, the fastest known where it is lowered; `"xla"`, no native code; or
        `"pallas"`, Pallas kernels, which were run in interpret mode on CPU only, and for GPU and
        TPU no more than compiled, so that whether they beat XLA there is not known.

    Returns:
      A `GradientTransformation` with the same state. In a `chain` it is not joined with others.

    Raises:
      ValueError: an unknown backend, or a transformation that is not made of stages.

    >>> import adamfn
    >>> tx = adamfn.with_backend(adamfn.adam(), "xla")
    """
    if backend not in BACKENDS:
        raise ValueError(f"with_backend: backend is {backend!r}; expected one of {BACKENDS}.")
    structure = structure_of(tx)
    if structure is tx:
        raise ValueError(f"with_backend: found {tx!r}; expected a transformation made of stages.")
    return _compose(structure, backend)


def _compose(structure: Structure, backend: Backend = "auto") -> GradientTransformation:
    """The transformation that a structure stands for."""
    segments = list(_segments(elements(structure)))
    accepted = [_keywords(own[0].update) if foreign else None for foreign, own in segments]

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
                now = wanted if last else Wanted()
                updates, moved, parts = joined.run(
                    own, updates, parts, params, extra, now._replace(backend=backend)
                )
            else:
                known = extra if takes is None else {k: v for k, v in extra.items() if k in takes}
                inner = _own(own[0]) if last and wanted.params else None
                if inner is None:
                    updates, part = own[0].update(updates, *parts, params, **known)
                else:
                    updates, moved, part = inner.advance(updates, *parts, params, known, wanted)
                parts = [part]
            next_states += parts
        if wanted.params and moved is None:
            moved = apply_updates(params, updates)
        return updates, moved, nested(structure, iter(next_states))

    takes: set[str] | None = set()
    for (foreign, own), keywords in zip(segments, accepted, strict=True):
        inner = _own(own[0]) if foreign else None
        names = inner.takes if inner else keywords
        names = names if foreign else {name for stage in own for name in stage.takes}
        takes = None if takes is None or names is None else takes | names
    return assemble(init, advance, takes, structure if backend == "auto" else None)


class Advance(Protocol):
    """The type of a function that takes a step: what `update` and `step` have in common."""

    def __call__(
        self,
        updates: PyTree,
        state: PyTree,
        params: PyTree,
        extra: Mapping[str, Any],
        wanted: Wanted,
    ) -> tuple[PyTree, PyTree, PyTree]:
        """Returns the updates and the moved parameters, as far as wanted, and the next state."""
        ...


class _Own(NamedTuple):
    """What an `update` of ours knows besides."""

    update: Any
    """Itself: `functools.wraps` gives its attributes to functions that do something else."""
    advance: Advance
    takes: Collection[str] | None
    """The extra arguments that it takes; None for any."""
    structure: Structure


def assemble(
    init: Callable[[PyTree], PyTree],
    advance: Advance,
    takes: Collection[str] | None,
    structure: Structure = None,
) -> GradientTransformation:
    """The transformation of an `advance`, which has a step of its own.

    Args:
      init: makes the state.
      advance: takes a step.
      takes: the extra arguments that it takes; None for any.
      structure: what a chain may join with its neighbours; None if it is to be left whole.
    """

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        updates, _, state = advance(updates, state, params, extra, Wanted())
        return updates, state

    # An attribute of a function survives where a transformation is copied, pickled or mapped.
    cast("Any", update).own = _Own(update, advance, takes, structure)
    return GradientTransformation(init, update)


def _own(tx: Any) -> _Own | None:
    own = getattr(tx.update, "own", None)
    return own if isinstance(own, _Own) and own.update is tx.update else None


def structure_of(tx: Transformation) -> Structure:
    """The stages that a transformation is made of, or the transformation itself."""
    own = _own(tx)
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
        " transformation. The state belongs to another chain: make it with this one's init(params)."
    )


def step(
    tx: Transformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    *,
    return_updates: bool = False,
    **extra: Any,
) -> Any:
    """One training update, from gradients to the next parameters.

    A chain that ends in stages of ours moves the parameters in the same pass over memory as the
    moments, on CPU in native code. Of any other transformation it is `update` and `apply_updates`.

    Args:
      tx: any transformation, ours or optax's.
      grads: the gradients; None where a leaf is not trained.
      state: the transformation's state. Donate it and the parameters to the jitted function that
        this is called in, and return them in the order in which that function takes them: they
        are then written in place. (JAX pairs donated arrays of one shape with results by order;
        `(state, params)` against `(params, state)` costs a copy of each.)
      params: the parameters: any pytree, such as an Equinox module.
      return_updates: whether to return the updates too, to be logged.
      **extra: what `update` takes besides, such as `learning_rate=`.

    Returns:
      The next parameters and the next state; with `return_updates` the updates after them.

    Raises:
      TypeError, ValueError: as `tx.update` and `apply_updates`; an argument in `extra` that no part
        of the chain takes.

    >>> from functools import partial
    >>> import adamfn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> tx = adamfn.adam(0.1)
    >>> params = {"w": jnp.array([1.0, -2.0])}
    >>> state = tx.init(params)
    >>> @partial(jax.jit, donate_argnums=(0, 1))
    ... def train_step(params, state):
    ...     grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
    ...     return adamfn.step(tx, grads, state, params)
    >>> params, state = train_step(params, state)
    >>> print(params["w"])
    [ 0.9 -1.9]
    """
    update: Any = getattr(tx, "update", None)
    if not callable(update):
        raise TypeError(
            f"step: the first argument is {tx!r}; expected a transformation with `init` and"
            " `update`. Call the factory first: adamfn.adam(), not adamfn.adam."
        )
    own = _own(tx)
    if own is None:
        updates, state = update(grads, state, params, **extra)
        params = apply_updates(params, updates)
    else:
        for name in extra if own.takes is not None else ():
            if name not in own.takes:
                known = ", ".join(f"{taken}=" for taken in sorted(own.takes)) or "none"
                raise TypeError(
                    f"step: found the argument {name}={extra[name]!r}, which no part of the chain"
                    f" takes; expected {known}."
                )
        wanted = Wanted(updates=return_updates, params=True)
        trained = _where_updated(params, grads)
        updates, moved, state = own.advance(grads, state, trained, extra, wanted)
        params = _merged(params, moved)
    return (params, state, updates) if return_updates else (params, state)


def apply_updates(
    params: PyTree,
    updates: PyTree,
    *,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    count: chex.Numeric | None = None,
) -> PyTree:
    """Adds updates to parameters: `params + updates`, leaf by leaf.

    The sum is taken in float32 at least and has the parameter's dtype and shape. Where an update
    is `None`, the parameter stays as it is.

    Bfloat16 parameters have 8 bits: an update less than a five-hundredth of its parameter is lost
    when their sum is rounded to nearest, and training stalls. With `rounding="stochastic"` the sum
    is rounded up or down with probabilities that make it right on average, so bfloat16 parameters
    train without a float32 copy.

    Args:
      params: any pytree of floating-point or complex arrays.
      updates: a tree of the same structure and shapes, or with `None` in place of a leaf.
      rounding: how bfloat16 sums are rounded, `"nearest"` or `"stochastic"`.
      count: the step, an integer or an integer scalar, such as a state's `count`: with it the
        noise differs from step to step and is the same when a step is taken again. Needed for
        stochastic rounding.

    Returns:
      The new parameters.

    Raises:
      ValueError: structure or shapes differ; names the leaf. An unknown rounding, or a stochastic
        one without a count.
      TypeError: a leaf is not an array of floating-point or complex numbers, or is float16 and to
        be rounded stochastically.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.array([1.0, 2.0]), "frozen": jnp.array(3.0)}
    >>> updates = {"w": jnp.array([0.5, -0.5]), "frozen": None}
    >>> print(adamfn.apply_updates(params, updates)["w"])
    [1.5 1.5]
    """
    trained = _where_updated(params, updates)
    way_out = "Pass the updates that `update` returned for these parameters."
    if rounding == "nearest":
        check_inexact(trained, "apply_updates: params")
        name = "apply_updates: params"
        added = matching_leaves(name, trained, "updates", updates, way_out)
        leaves, treedef = jax.tree.flatten(trained)
        moved = treedef.unflatten([_add(p, u) for p, u in zip(leaves, added, strict=True)])
    elif rounding == "stochastic":
        moved = add_stochastically(trained, updates, count, way_out)
    else:
        raise ValueError(
            f"apply_updates: rounding is {rounding!r}; expected 'nearest' or 'stochastic'."
        )
    return _merged(params, moved)


@jax.jit
def _add(param: jax.Array, update: jax.Array) -> jax.Array:
    param, update = jnp.asarray(param), jnp.asarray(update)
    wide = jnp.promote_types(jnp.promote_types(param.dtype, update.dtype), jnp.float32)
    return (param.astype(wide) + update.astype(wide)).astype(param.dtype)


def _where_updated(params: PyTree, updates: PyTree) -> PyTree:
    """The parameters, with None where an update is None."""
    structure = jax.tree.structure(params, is_leaf=_is_none)
    if structure != jax.tree.structure(updates, is_leaf=_is_none):
        return params  # a check to come says where they differ
    return jax.tree.map(lambda p, u: None if u is None else p, params, updates, is_leaf=_is_none)


def _merged(params: PyTree, moved: PyTree) -> PyTree:
    """The moved parameters, and the others where they are None."""
    return jax.tree.map(lambda p, m: p if m is None else m, params, moved, is_leaf=_is_none)


def _keywords(function: Callable[..., Any]) -> frozenset[str] | None:
    """The extra arguments that an update function takes, or None if it takes any."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return frozenset(parameters) - {"updates", "state", "params"}


def _is_none(leaf: Any) -> bool:
    return leaf is None
