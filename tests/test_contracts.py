# SPDX-License-Identifier: Apache-2.0
"""What others rely on in every state: how optax maps it, how JAX exports a step of it."""

import os
import pickle
import subprocess
import sys
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import adamfn
from adamfn import formats

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
"""Formats in which no row can rest, so that `lazy_adam` refuses them."""
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
SHAPES = {"bias": (8,), "kernel": (128, 256), "wide": (256, 384)}
FIELDS = ("mu", "nu", "nu_max")


def drawn(seed, container=dict):
    random = np.random.default_rng(seed)
    leaves = {k: random.normal(size=shape).astype(np.float32) for k, shape in SHAPES.items()}
    return leaves if container is dict else container(leaves.values())


def names(container):
    return {name: name for name in SHAPES} if container is dict else container(SHAPES)


def is_nothing(leaf):
    """What stands where a format keeps nothing of a moment, or where a leaf is masked."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


class Named:
    """What is kept of a leaf, beside its name: not a tuple, which would be a tree."""

    def __init__(self, kept, name):
        self.kept, self.name = kept, name


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize(("recipe", "moments", "container"), CASES)
def test_optax_maps_what_is_kept_of_each_parameter(recipe, moments, container):
    params, tx = drawn(0, container), RECIPES[recipe](moments=moments)
    labels = jax.tree.map(lambda name: "y" if name == "wide" else "x", names(container))
    trained = jax.tree.map(lambda label: label == "x", labels)
    inject = optax.inject_hyperparams(RECIPES[recipe], static_args="moments")
    for wrapper in (
        tx,
        optax.chain(optax.clip(1.0), tx),
        optax.masked(tx, trained),
        optax.partition({"x": tx, "y": optax.sgd(1.0)}, labels),
        optax.MultiSteps(tx, 2),
        inject(1e-3, moments=moments),
    ):
        state = wrapper.init(params)
        mapped = optax.tree.map_params(wrapper, Named, state, names(container), is_leaf=is_nothing)
        kept = 0
        for path, found in jax.tree.leaves_with_path(mapped):
            fields = {getattr(key, "name", None) for key in path}
            if not fields & {*FIELDS, "acc_grads"}:
                assert hasattr(found, "dtype"), path  # as it was: a count, a rate, scales
            elif not is_nothing(found.kept):
                assert found.kept.shape == SHAPES[found.name], path
                kept += 1
        assert kept == sum(x.shape in SHAPES.values() for x in jax.tree.leaves(state))
        # Without a change it is the state, scales and all.
        same(optax.tree.map_params(wrapper, lambda kept: kept, state), state)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "lazy_adam"])
def test_optax_maps_packed_states(recipe):
    tx = adamfn.packed(RECIPES[recipe](), below=100)
    state = tx.init(drawn(0))
    mapped = optax.tree.map_params(tx, lambda kept: kept + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    for path, x in jax.tree.leaves_with_path(state):
        found = dict(jax.tree.leaves_with_path(mapped))[path]
        np.testing.assert_array_equal(found, x + ("leaves" in jax.tree_util.keystr(path)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_packed_state_has_one_structure(recipe):
    if recipe == "lazy_adam":
        with pytest.raises(ValueError, match="needs a statistic of each leaf"):
            adamfn.packed(RECIPES[recipe]())
        return
    tx = adamfn.packed(RECIPES[recipe]())
    state = tx.init(drawn(0))
    for other in (jax.jit(tx.init)(drawn(0)), jax.eval_shape(tx.init, drawn(0))):
        assert jax.tree.structure(other) == jax.tree.structure(state)
        for a, b in zip(*map(jax.tree.leaves, (other, state)), strict=True):
            assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)


def train_step(tx, params, state, x):
    def loss(params):
        return jnp.mean((x @ params["kernel"]) ** 2) + sum(jnp.sum(p**2) for p in params.values())

    return adamfn.step(tx, jax.grad(loss)(params), state, params)


def drawn_for_export():
    """A leaf that formats hold, and one that none does."""
    return {name: leaf for name, leaf in drawn(0).items() if name != "wide"}


X = np.random.default_rng(1).normal(size=(4, 128)).astype(np.float32)
EVERYWHERE = ("cpu", "tpu", "cuda")
EXPORTED = {
    **{name: adamfn.adamw(1e-2, moments=name) for name in formats.FORMATS},
    **{name: RECIPES[name](1e-2) for name in ("amsgrad", "lazy_adam", "nadam")},
    "packed": adamfn.packed(adamfn.adamw(1e-2)),
    "lone stage": adamfn.scale_by_lr(1e-2),
    "schedule": adamfn.adam(lambda count: 0.1 / count),
    "pallas": adamfn.with_backend(adamfn.adamw(1e-2), "pallas"),
}
HAVE_KERNELS = ("8bit", "4bit", "pallas")


@pytest.mark.parametrize(
    ("name", "platforms"),
    [*((name, EVERYWHERE) for name in EXPORTED), ("8bit", None)],
    ids=str,
)
def test_an_exported_step_is_the_jitted_one(name, platforms):
    tx, params = EXPORTED[name], drawn_for_export()
    step = jax.jit(partial(train_step, tx))
    params, state = step(params, tx.init(params), X)
    exported = export.export(step, platforms=platforms)(params, state, X)
    again = export.deserialize(exported.serialize())
    assert again.platforms == (platforms or ("cpu",))
    # A step for TPU keeps its kernel; native code is not there where CPU's program is loaded.
    assert ("tpu_custom_call" in exported.mlir_module()) == (
        name in HAVE_KERNELS and bool(platforms)
    )
    assert "@adamfn_step_v" not in exported.mlir_module()
    found, expected = again.call(params, state, X), step(params, state, X)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert a.dtype == b.dtype
        if a.dtype in (jnp.int8, jnp.uint8):
            # XLA's code here and native code there may round a number at a boundary apart.
            assert np.mean(np.asarray(a) != np.asarray(b)) < 1e-3
        else:
            np.testing.assert_allclose(
                np.asarray(a, float), np.asarray(b, float), rtol=1e-5, atol=1e-6
            )


# Whose formulas know no sizes, or whose format is another's in this.
OTHERS = {"nadam", "schedule", "lone stage", "bfloat16", "blockmean"}


@pytest.mark.parametrize("name", sorted(EXPORTED.keys() - OTHERS))
def test_an_export_with_sizes_that_are_not_known(name):
    """A format holds a leaf if that is known: here "known" alone, by its constraint."""
    rows, length = export.symbolic_shape("rows, length", constraints=["rows >= 64"])
    sizes = {"known": (rows, 128), "unknown": (rows, length), "vector": (length,)}
    symbolic = {k: jax.ShapeDtypeStruct(size, jnp.float32) for k, size in sizes.items()}
    # With so few elements, a step chooses what the export did.
    rows, length = 64, 7
    sizes = {"known": (rows, 128), "unknown": (rows, length), "vector": (length,)}
    params = {k: np.full(size, 0.5, np.float32) for k, size in sizes.items()}
    tx = adamfn.packed(adamfn.adamw(1e-2), below=1) if name == "packed" else EXPORTED[name]
    step = jax.jit(partial(adamfn.step, tx))
    exported = export.export(step)(symbolic, jax.eval_shape(tx.init, symbolic), symbolic)
    grads, state = jax.tree.map(lambda p: p + np.arange(p.shape[-1]), params), tx.init(params)
    found, expected = exported.call(grads, state, params), step(grads, state, params)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=1e-5, atol=1)
    for a, b in zip(*map(jax.tree.leaves, (found[0], expected[0])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_exported_step_needs_adamfn_alone(tmp_path):
    """In a process of its own, which has imported nothing else that could know the states."""
    code = """
        import pickle, sys
        import adamfn, jax
        from jax import export

        for line in open(sys.argv[1] + "/names"):
            blob = open(f"{sys.argv[1]}/{line.strip()}", "rb").read()
            step, operands = pickle.loads(blob)
            tx = adamfn.adamw(1e-2, moments=line.strip())
            params, x = operands
            state = tx.init(params)
            moved, after = export.deserialize(bytearray(step)).call(params, state, x)
            assert jax.tree.structure(after) == jax.tree.structure(state)
            assert after[0].count == 1
            assert all((moved[name] != params[name]).any() for name in params)
    """
    for name in formats.FORMATS:
        tx, params = EXPORTED[name], drawn_for_export()
        step = export.export(jax.jit(partial(train_step, tx)))(params, tx.init(params), X)
        blob = pickle.dumps((bytes(step.serialize()), (params, X)))
        (tmp_path / name).write_bytes(blob)
    (tmp_path / "names").write_text("\n".join(formats.FORMATS))
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    quick = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    run = subprocess.run(command, check=False, capture_output=True, text=True, env=quick)
    assert run.returncode == 0, run.stderr
