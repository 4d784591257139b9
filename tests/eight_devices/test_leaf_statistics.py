# SPDX-License-Identifier: Apache-2.0
"""Statistics of a whole leaf on a mesh: one small all-reduce, and the numbers of one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import adamfn
from adamfn.sharding import sharded, state_shardings

MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
SPLIT = jax.NamedSharding(MESH, jax.P("data"))
SHAPE = (64, 512)


def recipe(stage, first=()):
    return adamfn.chain(
        *first,
        adamfn.scale_by_moments(b2=0.9),
        adamfn.bias_correct(b2=0.9),
        *stage,
        adamfn.scale_by_lr(0.1),
    )


RECIPES = {
    "cautious": (recipe([adamfn.cautious_updates()]), 1),
    "clipped": (recipe([adamfn.clip_updates(b2=0.9)]), 1),
    "norm": (recipe([], [adamfn.clip_by_global_norm(1.0)]), 1),
    "stacked": (recipe([adamfn.clip_updates(b2=0.9, stacked=True)]), 0),
}
"""And how many all-reduces a step takes; layers split over devices need none."""


@pytest.mark.parametrize("name", RECIPES)
def test_one_small_all_reduce(name):
    tx, number = RECIPES[name]
    params = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)
    grads = [jnp.sin(params * k) for k in (1, 2, 5)]
    shardings = state_shardings(tx, params, SPLIT)
    step = jax.jit(
        lambda g, s, p: adamfn.step(tx, g, s, p),
        in_shardings=(SPLIT, shardings, SPLIT),
        out_shardings=(SPLIT, shardings),
    )
    text = step.lower(grads[0], tx.init(params), params).compile().as_text()
    sent = re.findall(r"= (\S+) (all-reduce|all-gather|all-to-all|collective-permute)\(", text)
    assert [kind for _, kind in sent] == ["all-reduce"] * number
    assert all(shape.startswith("f32[]") for shape, _ in sent)

    alone = jax.jit(lambda g, s, p: adamfn.step(tx, g, s, p))
    moved, state = jax.device_put((params, tx.init(params)), (SPLIT, shardings))
    expected, whole = params, tx.init(params)
    for g in grads:
        moved, state = step(jax.device_put(g, SPLIT), state, moved)
        expected, whole = alone(g, whole, expected)
    np.testing.assert_allclose(moved, expected, atol=1e-6)


def test_a_norm_over_shards_is_given():
    """Inside `shard_map` a norm is that of a shard, unless `update` is given the whole one."""
    tx, _ = RECIPES["norm"]
    params = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)

    def body(g, p, state):
        norm = jnp.sqrt(jax.lax.psum(jnp.sum(g**2), "data"))
        return adamfn.step(tx, g, state, p, grad_norm=norm)

    state = tx.init(params)
    specs = jax.tree.map(lambda x: jax.P("data") if x.ndim else jax.P(), state)
    run = jax.shard_map(
        body,
        mesh=MESH,
        in_specs=(jax.P("data"), jax.P("data"), specs),
        out_specs=(jax.P("data"), specs),
    )
    moved, _ = jax.jit(run)(params, params, state)
    expected, _ = adamfn.step(tx, params, state, params)
    np.testing.assert_allclose(moved, expected, atol=1e-6)


SHAPES = {"both": (128, 2048), "layers": (4, 32, 1024), "bias": (512,), "norm": (512,)}
SPECS = {
    "both": jax.P("data", "model"),
    "layers": jax.P("data", None, "model"),
    "bias": jax.P("model"),
    "norm": jax.P("model"),
}


def lean(backend):
    layers = {name: name == "layers" for name in SHAPES}
    return adamfn.with_backend(
        adamfn.chain(
            adamfn.scale_by_moments(b2=0.9, moments="8bit"),
            adamfn.bias_correct(b2=0.9),
            adamfn.cautious_updates(stacked=layers),
            adamfn.clip_updates(b2=0.9, stacked=layers),
            adamfn.scale_by_lr(0.1),
        ),
        backend,
    )


def drawn(steps):
    random = np.random.default_rng(0)
    scale = dict.fromkeys(SHAPES, 1.0) | {"layers": np.arange(1.0, 5.0).reshape(4, 1, 1)}
    return [
        {k: jnp.asarray(random.normal(size=SHAPES[k]) * scale[k], jnp.float32) for k in SHAPES}
        for _ in range(steps + 1)
    ]


@functools.cache
def on_one_device():
    (params, *grads), tx = drawn(3), lean("xla")
    state, step = tx.init(params), jax.jit(functools.partial(adamfn.step, tx))
    for g in grads:
        params, state = step(g, state, params)
    return params, state


@pytest.mark.optimized  # codes of two programs
@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        ("auto", AxisType.Auto),
        ("xla", AxisType.Explicit),
        ("pallas", AxisType.Auto),
        ("pallas", AxisType.Explicit),
    ],
)
def test_means_over_all_shards(kind, backend):
    """A shard's kernel sums its own; what is added are numbers, one for each leaf or layer."""
    params, *grads = drawn(3)
    tx, (expected, whole) = lean(backend), on_one_device()
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    where = {name: jax.NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    if kind == AxisType.Auto:
        tx = sharded(tx, where)
    with jax.set_mesh(mesh):
        moved = jax.device_put(params, where)
        state = jax.jit(tx.init)(moved)
        step = jax.jit(lambda g, s, p: adamfn.step(tx, g, s, p))
        compiled = step.lower(jax.device_put(grads[0], where), state, moved).compile()
        for g in grads:
            moved, state = step(jax.device_put(g, where), state, moved)
    lines = re.findall(
        r"= (.*) (all-reduce|all-gather|all-to-all|collective-permute)\(", compiled.as_text()
    )
    assert {what for _, what in lines} == {"all-reduce"}
    sent = {shape for types, _ in lines for shape in re.findall(r"\w\[([\d,]*)\]", types)}
    assert sent <= {"", "1"}
    for name, found in moved.items():
        np.testing.assert_allclose(found, expected[name], atol=1e-6, err_msg=name)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        if b.dtype in (jnp.int8, jnp.uint8):
            np.testing.assert_array_equal(a, b)
