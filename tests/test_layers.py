# SPDX-License-Identifier: Apache-2.0
"""Statistics of leaves that hold layers along their first axis: as of each layer by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamfn

LAYERS, STEPS = 3, 20
STACKED = adamfn.masks.named("layers")


def recipe(stacked):
    return adamfn.chain(
        adamfn.scale_by_moments(b2=0.9),
        adamfn.bias_correct(b2=0.9),
        adamfn.cautious_updates(stacked=stacked),
        adamfn.add_decayed_weights(0.1),
        adamfn.clip_updates(b2=0.9, stacked=stacked),
        adamfn.scale_by_lr(0.1),
    )


def unrolled(params):
    per_layer = [jax.tree.map(lambda p, k=k: p[k], params["layers"]) for k in range(LAYERS)]
    return {**params, "layers": per_layer}


def scanned_model(params, x):
    def layer(x, p):
        return jnp.tanh(x @ p["kernel"] + p["bias"]), None

    return jax.lax.scan(layer, x, params["layers"])[0] @ params["head"]


def unrolled_model(params, x):
    for p in params["layers"]:
        x = jnp.tanh(x @ p["kernel"] + p["bias"])
    return x @ params["head"]


def train(tx, model, params):
    x, y = np.random.default_rng(1).normal(size=(2, 16, 4)).astype(np.float32)

    @jax.jit
    def step(state, params):
        grads = jax.grad(lambda p: jnp.mean((model(p, x) - y) ** 2))(params)
        return adamfn.step(tx, grads, state, params)

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(state, params)
    return params


def parameters():
    rng = np.random.default_rng(0)
    scale = 10.0 ** np.arange(LAYERS).reshape(LAYERS, 1, 1)  # layers that differ
    params = {
        "layers": {
            "kernel": rng.normal(size=(LAYERS, 4, 4)) * scale / 10,
            "bias": rng.normal(size=(LAYERS, 4)),
        },
        "head": rng.normal(size=(4, 4)),
    }
    return jax.tree.map(jnp.float32, params)


def furthest(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(x - y))) for x, y in pairs)


def test_a_scanned_model_trains_as_the_unrolled_one():
    params = parameters()
    expected = train(recipe(None), unrolled_model, unrolled(params))
    found = train(recipe(STACKED), scanned_model, params)
    assert furthest(unrolled(found), expected) < 2e-6
    whole = train(recipe(None), scanned_model, params)
    assert furthest(unrolled(whole), expected) > 1e-3


@pytest.mark.parametrize(
    "stacked", [{"layers": True, "head": False}, STACKED], ids=["tree", "names"]
)
def test_one_step_layer_by_layer(stacked):
    params, tx, plain = parameters(), recipe(stacked), recipe(None)
    grads = jax.tree.map(jnp.sin, params)
    found, _ = tx.update(grads, tx.init(params), params)
    layers = unrolled(params)
    expected, _ = plain.update(unrolled(grads), plain.init(layers), layers)
    assert furthest(unrolled(found), expected) < 1e-7


def test_mistakes_are_named():
    params = {"layers": jnp.ones(()), "head": jnp.ones(2)}
    tx = recipe({"layers": True, "head": False})
    with pytest.raises(ValueError, match=r"cautious_updates: the leaf at layers is float32.*; exp"):
        tx.update(params, tx.init(params), params)
    tx = recipe({"head": 1})
    with pytest.raises(TypeError, match=r"cautious_updates: stacked: the mask at \['head'\] is 1"):
        tx.update(params, tx.init(params), params)
    alone = adamfn.chain(adamfn.clip_updates(), adamfn.scale_by_lr())
    with pytest.raises(ValueError, match="clip_updates: it reads grads, and no stage before"):
        alone.update(params, alone.init(params))


def test_empty_leaves_and_gradients_whose_squares_overflow():
    params = {"none": jnp.ones((0, 3)), "layers": jnp.ones((0, 2)), "w": jnp.ones(2)}
    tx = recipe(STACKED)
    grads = {**params, "w": jnp.array([1e30, 1.0])}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert jnp.all(jnp.isfinite(updates["w"]))
    assert updates["none"].shape == (0, 3)
