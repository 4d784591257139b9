# SPDX-License-Identifier: Apache-2.0
"""adamfn.sharding: where each part of a state belongs. `eight_devices` holds what needs devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

import adamfn
from adamfn import formats
from adamfn.sharding import state_shardings

P = jax.P
MESH = AbstractMesh((4, 2), ("data", "model"))


def abstract(shapes):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: type(x) is tuple,
    )


def on(spec, mesh=MESH):
    return jax.NamedSharding(mesh, spec)


def specs_of(tx, shapes, specs, zero_axis=None):
    """The spec of every array in the state, by its path."""
    params = abstract(shapes)
    shardings = jax.tree.map(on, specs, is_leaf=lambda x: isinstance(x, P))
    found = state_shardings(tx, params, shardings, zero_axis)
    assert jax.tree.structure(found) == jax.tree.structure(jax.eval_shape(tx.init, params))
    return {jax.tree_util.keystr(p): s.spec for p, s in jax.tree.leaves_with_path(found)}


def test_moments_follow_their_parameters_and_scalars_go_everywhere():
    shapes = {"a": (8, 16), "b": [{"a": (16, 8)}, (8,)]}
    specs = {"a": P("data"), "b": [{"a": P(None, "model")}, P("model")]}
    found = specs_of(adamfn.adamw(1e-3), shapes, specs)
    for field in ("mu", "nu"):
        assert found[f"[0].{field}['a']"] == P("data")
        assert found[f"[0].{field}['b'][0]['a']"] == P(None, "model")
        assert found[f"[0].{field}['b'][1]"] == P("model")
    assert {found["[0].count"], found["[3].learning_rate"]} == {P()}


BOTH, ROWS = P("data", "model"), P("data")
BLOCKS = (".scale", ".top", ".step")


@pytest.mark.parametrize(
    ("moments", "shape", "scales"),
    [
        ("8bit", (64, 1024), dict.fromkeys(BLOCKS, BOTH)),
        # One block of 256 and three of 256: two devices would share one.
        ("8bit", (64, 256), dict.fromkeys(BLOCKS, ROWS)),
        ("8bit", (64, 768), dict.fromkeys(BLOCKS, ROWS)),
        # The last of six blocks of 176 is not full, and three of them are not half of 1048.
        ("8bit", (64, 1048), dict.fromkeys(BLOCKS, ROWS)),
        ("4bit", (64, 512), dict.fromkeys(BLOCKS, BOTH)),
        ("bfloat16", (64, 128), {}),
        (
            "factored",
            (128, 512),
            {"[0]": BOTH, "[1].rows": ROWS, "[1].columns": P(None, "model")},
        ),
        ("blockmean", (64, 512), {"[0]": BOTH, "[1]": ROWS}),
    ],
)
def test_codes_and_scales(moments, shape, scales):
    expected = {f"[0].scales['w'][0]{part}": spec for part, spec in scales.items()}
    expected |= {"[0].count": P(), "[3].learning_rate": P(), "[3].written": P()}
    for field in CODES.get(moments, ("mu", "nu")):
        expected[f"[0].{field}['w']"] = BOTH
    tx = adamfn.adamw(1e-3, moments=moments)
    for specs, zero_axis in ((P("data", "model"), None), (P(None, "model"), "data")):
        assert specs_of(tx, {"w": shape}, {"w": specs}, zero_axis) == expected


CODES = {"4bit": ("nu",), "factored": ("mu",), "blockmean": ("mu",)}
"""The moments that have codes, if not both."""


@pytest.mark.parametrize(
    ("moments", "shape", "codes"),
    [
        ("float32", (6, 8), P(None, "data")),  # the first that divides
        ("float32", (6, 10), P()),  # none does
        ("8bit", (32, 256), P("data")),
        ("8bit", (3, 4096), P(None, "data")),
        ("8bit", (2, 64, 256), P(None, "data")),
        ("8bit", (50257, 768), P(None, "data")),  # within a block, rather than whole
    ],
)
def test_zero_takes_the_dimension_that_leaves_least(moments, shape, codes):
    found = specs_of(adamfn.adam(moments=moments), {"w": shape}, {"w": P()}, "data")
    assert found["[0].mu['w']"] == codes


def test_zero_beside_other_axes():
    tx = adamfn.adam()
    assert specs_of(tx, {"w": (8, 6)}, {"w": P("model")}, "data")["[0].mu['w']"] == P(
        ("model", "data")
    )
    assert specs_of(tx, {"w": (2, 8)}, {"w": P("model")}, "data")["[0].mu['w']"] == P(
        "model", "data"
    )
    for used in (P("data"), P(None, ("model", "data"))):  # already along it: fully sharded
        assert specs_of(tx, {"w": (8, 16)}, {"w": used}, "data")["[0].mu['w']"] == used


class Pair(NamedTuple):
    mu: object
    nu: object


class Scaled(NamedTuple):
    scales: object
    head: object


@pytest.mark.parametrize(
    "shapes",
    [
        (8, 16),
        [(8, 16), (16, 8), (8, 4)],
        [(8, 16), (8, 16)],
        {"w": (8, 16), "in": {"w": (8, 16)}},
        Pair(mu=(8, 16), nu=(8, 16)),
        Scaled(scales={"w": (8, 16)}, head=(8, 16)),
        {"count": (8, 16), "mu": (16, 8), "0": {"nu": (4, 8)}},
    ],
)
def test_a_parameter_is_not_taken_for_another(shapes):
    params = abstract(shapes)
    choices = iter([P("data"), P("model"), P(None, "data"), P(None, "model")])
    specs = jax.tree.map(lambda _: next(choices), params)
    expected = jax.tree.map(on, specs, is_leaf=lambda x: isinstance(x, P))
    for tx in (adamfn.adam(), adamfn.adamw(), optax.adam(1e-3), adamfn.amsgrad(), adamfn.nadam()):
        state = state_shardings(tx, params, expected)
        assert state[0].mu == state[0].nu == expected
        assert state[0].count == on(P())


class Twice:
    """A format whose scales have the leaf's own shape."""

    def encode(self, mu, nu, noise):
        return formats.Stored(mu, nu, (mu, {"0": nu}))

    def decode(self, stored):
        return stored.mu, stored.nu

    def holds(self, shape, dtype):
        return len(shape) == 2


def test_entries_of_a_format_are_not_taken_for_parameters():
    choices = [P("data"), P("model"), P("model"), P(None, "data"), P(None, "model")]
    expected = [on(spec) for spec in choices]
    shapes = [(8, 16), (8, 16), (8,), (8, 16), (16, 8)]
    for container in (list, tuple):
        params = container(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        given = jax.tree.unflatten(jax.tree.structure(params), expected)
        (moments, *_) = state_shardings(adamfn.adam(moments=Twice()), params, given)
        assert moments.mu == moments.nu == given
        assert moments.scales == {
            str(k): ((s, {"0": s}),) for k, s in enumerate(expected) if k != 2
        }


WRAPPERS = {
    "optax": optax.adamw(1e-3),
    "mixed": optax.chain(optax.clip_by_global_norm(1.0), adamfn.adamw(1e-3), optax.trace(0.9)),
    "ours around": adamfn.chain(optax.trace(0.9), adamfn.adam()),
    "injected": optax.inject_hyperparams(adamfn.adam)(1e-3),
    "finite": optax.apply_if_finite(adamfn.adam(), 5),
    "accumulated": optax.MultiSteps(adamfn.adam(), 4),
    "masked": optax.masked(adamfn.adam(), {"a": True, "b": {"a": False, "c": True}}),
    "masked above": optax.masked(adamfn.adam(), {"a": True, "b": False}),
    "partition": optax.partition(
        {"x": adamfn.adam(), "y": optax.sgd(1.0, 0.9)}, {"a": "x", "b": {"a": "y", "c": "x"}}
    ),
    "lookahead-like": optax.ema(0.9),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_chains_and_wrappers(name):
    shapes = {"a": (8, 16), "b": {"a": (16, 8), "c": (4,)}}
    specs = {"a": P("data"), "b": {"a": P("model"), "c": P("data")}}
    found = specs_of(WRAPPERS[name], shapes, specs)
    assert found
    known = {"['a']": P("data"), "['b']['a']": P("model"), "['b']['c']": P("data")}
    matched = 0
    for path, spec in found.items():
        owner = next((p for p in sorted(known, key=len, reverse=True) if path.endswith(p)), None)
        assert spec == known.get(owner, P()), path
        matched += owner is not None
    assert matched >= 2


RECIPES = {
    "adam": adamfn.adam,
    "adamw": adamfn.adamw,
    "adamax": adamfn.adamax,
    "amsgrad": adamfn.amsgrad,
    "lazy_adam": adamfn.lazy_adam,
    "nadam": adamfn.nadam,
    "radam": adamfn.radam,
}
SHARES_ROWS = ("factored", "blockmean")
"""Formats that do not store rows by themselves, so that `lazy_adam` refuses them."""
PAIRS = [
    (recipe, moments)
    for recipe in RECIPES
    for moments in formats.FORMATS
    if recipe != "lazy_adam" or moments not in SHARES_ROWS
]
CASES = [
    (*pair, container)
    for turn, pair in enumerate(PAIRS)
    for place, container in enumerate((dict, list, tuple))
    if turn % 3 == place or pair[1] == "8bit"
]
"""A container for each pair, and all for a format whose codes have scales."""
WHERE_LARGE = {  # by the number of columns, which tells the leaves apart
    256: ((128, 256), P("data"), ("data", None)),
    512: ((384, 512), P(None, "model"), ("data", "model")),
}
"""A leaf's shape, its spec, and the axes that split its state with `zero_axis="data"`."""


def tree_of(container, leaves):
    keys = ("a", "b", "c")
    return dict(zip(keys, leaves, strict=True)) if container is dict else container(leaves)


def wrappers_of(tx, recipe, moments, container):
    labels = tree_of(container, ["x", "y", "x"])
    return [
        tx,
        optax.chain(optax.clip_by_global_norm(1.0), tx),
        optax.masked(tx, jax.tree.map(lambda label: label == "x", labels)),
        optax.partition({"x": tx, "y": optax.sgd(1.0)}, labels),
        optax.MultiSteps(tx, 2),
        optax.inject_hyperparams(RECIPES[recipe], static_args="moments")(1e-3, moments=moments),
    ]


@pytest.mark.parametrize(("recipe", "moments", "container"), CASES)
def test_scales_belong_to_their_leaf_in_every_chain_and_wrapper(recipe, moments, container):
    small = jax.ShapeDtypeStruct((8,), jnp.float32)
    large = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape, *_ in WHERE_LARGE.values()]
    specs = [spec for _, spec, _ in WHERE_LARGE.values()]
    params = tree_of(container, [large[0], small, large[1]])
    given = tree_of(container, [on(specs[0]), on(P("model")), on(specs[1])])
    tx = RECIPES[recipe](moments=moments)
    for wrapper in wrappers_of(tx, recipe, moments, container):
        shapes = jax.eval_shape(wrapper.init, params)
        found = state_shardings(wrapper, params, given, "data")
        assert jax.tree.structure(found) == jax.tree.structure(shapes)
        seen = set()
        for array, sharding in zip(*map(jax.tree.leaves, (shapes, found)), strict=True):
            if len(array.shape) < 2:
                assert sharding.spec in (P(), P(("model", "data")))
                assert array.shape == (8,) or sharding.spec == P()
                continue
            shape, axes = next(
                (shape, axes)
                for shape, _, axes in WHERE_LARGE.values()
                if array.shape[0] == shape[0] or array.shape == (1, shape[1])
            )
            # A number for all of an axis is everywhere; those of 2 blocks and more are split.
            expected = [name if n > 1 else None for n, name in zip(array.shape, axes, strict=True)]
            assert tuple(sharding.spec) + (None,) * (2 - len(sharding.spec)) == tuple(expected)
            seen.add((shape, array.shape))
        assert {shape for shape, _ in seen} == {shape for shape, *_ in WHERE_LARGE.values()}


class Kept(NamedTuple):
    mu: object
    nu: object
    scales: object


def average(u, mu, nu):
    mu, nu = (mu + u) / 2, (nu + u**2) / 2
    return mu, mu, nu


def test_scales_of_a_users_own_stage_that_does_not_count():
    keeps = {"mu": jnp.zeros_like, "nu": jnp.zeros_like}
    stage = adamfn.Stage("average", average, keeps=keeps, state=Kept, moments="8bit")
    params = abstract([(128, 256), (8,), (384, 512)])
    given = [on(P("data")), on(P("model")), on(P(None, "model"))]
    alone = adamfn.from_stage(stage)
    chained = adamfn.chain(alone, adamfn.adam())  # whose adam counts
    for own in (
        state_shardings(alone, params, given),
        state_shardings(chained, params, given)[0],
    ):
        assert own.mu == own.nu == given
        assert [*own.scales] == ["0", "2"]
        for key, sharding in {"0": on(P("data")), "2": on(P(None, "model"))}.items():
            assert jax.tree.leaves(own.scales[key]) == [sharding] * 3


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "lazy_adam"])
def test_packed_buffers_are_everywhere(recipe):
    tx = adamfn.packed(RECIPES[recipe](), below=100)
    shapes = {"a": (8, 16), "b": (8,), "c": (8,)}
    specs = {"a": P("data"), "b": P("model"), "c": P("data")}
    found = specs_of(tx, shapes, specs, "data")
    assert {s for path, s in found.items() if ".buffers" in path} == {P()}
    assert {s for path, s in found.items() if path.endswith(".leaves['a']")} == {P("data")}


def test_arrays_that_match_no_parameter_are_everywhere():
    class Buffers(NamedTuple):
        leaves: object
        buffers: object

    class State(NamedTuple):
        count: jax.Array
        mu: Buffers

    def init(params):
        return State(
            jnp.zeros((), jnp.int32),
            Buffers(jax.tree.map(jnp.zeros_like, params), (jnp.zeros(1000), jnp.zeros((9, 9)))),
        )

    tx = optax.GradientTransformation(init, lambda u, s, p=None: (u, s))
    found = specs_of(tx, {"w": (8, 8), "b": (8,)}, {"w": P("data"), "b": P("model")}, "data")
    assert found[".mu.leaves['w']"] == P("data")
    assert found[".mu.leaves['b']"] == P(("model", "data"))
    assert found[".mu.buffers[0]"] == found[".mu.buffers[1]"] == found[".count"] == P()


def test_shardings_may_stand_for_all_below():
    params = {"a": jnp.ones((8, 8)), "b": {"c": jnp.ones((8, 8)), "frozen": None}}
    for given in (on(P("data")), {"a": on(P("data")), "b": on(P("data"))}):
        state = state_shardings(adamfn.adam(), params, given)
        assert state[0].mu["a"] == state[0].mu["b"]["c"] == on(P("data"))
        assert state[0].mu["b"]["frozen"] is None


PARAMS = abstract({"a": (8, 16), "b": {"c": (8,)}})
FULL = {"a": on(P()), "b": {"c": on(P())}}
ELSEWHERE = on(P(), AbstractMesh((8,), ("x",)))


@pytest.mark.parametrize(
    ("shardings", "options", "error", "words"),
    [
        ({"a": on(P())}, {}, ValueError, ["no sharding", "['b']['c']", "float32[8]"]),
        ({**FULL, "d": on(P())}, {}, ValueError, ["['d']", "no leaf"]),
        ({"a": on(P()), "b": {"c": {"e": on(P())}}}, {}, ValueError, ["no sharding", "['b']['c']"]),
        ({**FULL, "a": P("data")}, {}, TypeError, ["['a'] is P", "('data'", "NamedSharding"]),
        ({**FULL, "a": 3}, {}, TypeError, ["['a']", "NamedSharding"]),
        ({}, {}, ValueError, ["no leaves"]),
        ({**FULL, "b": {"c": on(BOTH)}}, {}, ValueError, ["['b']['c']", "float32[8]"]),
        ({"a": on(P()), "b": ELSEWHERE}, {}, ValueError, ["['b']", "one mesh"]),
        (FULL, {"zero_axis": "batch"}, ValueError, ["'batch'", "an axis of data=4, model=2"]),
    ],
)
def test_errors_name_the_leaf_and_the_way_out(shardings, options, error, words):
    with pytest.raises(error) as raised:
        state_shardings(adamfn.adam(), PARAMS, shardings, **options)
    for word in ("state_shardings", "expected", *words):
        assert word in str(raised.value)


def test_a_dimension_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match=r"\['w'\] is float32\[6\].*data=4, model=2"):
        state_shardings(adamfn.adam(), abstract({"w": (6,)}), on(P("data")))


def test_a_memory_that_the_backend_lacks_is_an_error():
    real = jax.NamedSharding(jax.make_mesh((1,), ("data",)), P())
    with pytest.raises(ValueError, match=r"kinds: .*device.*Got memory kind: hbm"):
        state_shardings(adamfn.adam(), PARAMS, real, memory_kind="hbm")


@pytest.mark.parametrize("moments", formats.FORMATS)
def test_a_state_of_parameters_that_an_abstract_mesh_types(moments):
    """Without a mesh in force, as JAX 0.12 needs one to make an array that is split."""
    mesh = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    split = jax.NamedSharding(mesh, P("data", None))
    params = jax.ShapeDtypeStruct((512, 1024), jnp.float32, sharding=split)
    state = jax.eval_shape(adamfn.adam(moments=moments).init, params)[0]
    for x in jax.tree.leaves((state.mu, state.nu, state.scales)):
        expected = split.spec if x.shape[0] == 512 else P(None, None)
        assert (x.sharding.spec if x.sharding else P(None, None)) == expected


def test_nothing_is_computed():
    params = abstract({"w": (2**16, 2**20)})  # 256 GiB
    for moments in formats.FORMATS:
        tx = adamfn.adamw(moments=moments)
        state_shardings(tx, params, on(P()), "data")
