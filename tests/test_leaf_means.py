"""Means over a whole leaf: summed by kernels and in pieces, as XLA sums them at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamfn
from adamfn.backends import chunks as pieces
from adamfn.backends import gpu as triton
from adamfn.backends import kernels as pallas
from adamfn.backends.tpu import kernel as mosaic

STEPS = 3
RATE = 0.1


def recipe(moments, stacked=None):
    return adamfn.chain(
        adamfn.scale_by_moments(b2=0.9, moments=moments),
        adamfn.bias_correct(b2=0.9),
        adamfn.cautious_updates(stacked=stacked),
        adamfn.add_decayed_weights(0.1),
        adamfn.clip_updates(b2=0.9, stacked=stacked),
        adamfn.scale_by_lr(RATE),
    )


def trained(tx, shape):
    """Parameters and state after some steps, by gradients that differ from layer to layer."""
    keys = jax.random.split(jax.random.key(0), STEPS + 1)
    layers = jnp.arange(1.0, shape[0] + 1).reshape(-1, *[1] * (len(shape) - 1))
    params = jax.random.normal(keys[0], shape)
    state = tx.init(params)
    step = jax.jit(partial(adamfn.step, tx))
    for k, key in enumerate(keys[1:], 1):
        params, state = step(k * layers * jax.random.normal(key, shape), state, params)
    return params, state


@pytest.fixture
def passes(monkeypatch):
    """Which calls a way of running was asked for: whether each measured, or took the step."""
    made = []

    def watched(way):
        run_leaf = way.run_leaf

        def run(call, *operands, **options):
            made.append(call.program.measures is not None)
            return run_leaf(call, *operands, **options)

        monkeypatch.setattr(way, "run_leaf", run)
        monkeypatch.setitem(pallas._KERNELS, "cpu", () if way is pieces else (way,))
        monkeypatch.setattr(pieces, "ELEMENTS", 2**13)
        return made

    return watched


LEAVES = {
    "rows that no tile divides": ((96, 1100), None),
    "a cube": ((4, 64, 1100), None),
    "layers": ((4, 64, 1100), True),
    "layers of few rows": ((4, 3, 32, 640), True),
}


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize(
    ("way", "moments"),
    [
        (mosaic, "8bit"),
        (mosaic, "factored"),
        (triton, "8bit"),
        (pieces, "8bit"),
    ],
    ids=lambda x: getattr(x, "__name__", x).rpartition(".")[2],
)
def test_two_passes_are_one(passes, way, moments, leaf):
    shape, stacked = LEAVES[leaf]
    made = passes(way)
    tx = recipe(moments, stacked)
    found, state = trained(adamfn.with_backend(tx, "pallas"), shape)
    expected, whole = trained(adamfn.with_backend(tx, "xla"), shape)
    assert made == [True, True, False]
    # Sums in other orders: to a few roundings of the mean, on steps of a rate.
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6 * RATE)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        if a.dtype in (jnp.int8, jnp.uint8):
            np.testing.assert_array_equal(a, b)


def test_tiles_of_two_layers_are_not_summed_together(passes):
    made = passes(triton)
    tx = recipe("4bit", stacked=True)
    found, _ = trained(adamfn.with_backend(tx, "pallas"), (3, 31, 128))
    expected, _ = trained(adamfn.with_backend(tx, "xla"), (3, 31, 128))
    assert made == [False]  # the sums come in pieces
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6 * RATE)


def by_size(u, rate, size):
    return u * rate / size


def size_of(u, rate):
    return jnp.abs(u)


def by_mean_size(mean=size_of):
    return adamfn.from_stage(
        adamfn.Stage(
            "by_mean_size",
            by_size,
            scalars=lambda count, state, extra: ((0.5,), {}),
            mean=mean,
        )
    )


@pytest.mark.parametrize("backend", ["auto", "pallas"])
def test_a_stage_of_ones_own(backend):
    tx = adamfn.with_backend(by_mean_size(), backend)
    u = jnp.array([[1.0, -2.0], [4.0, -5.0]])
    updates, _ = tx.update(u, tx.init(u))
    np.testing.assert_allclose(updates, u / 6, rtol=1e-6)


def test_mistakes_are_named():
    tx = by_mean_size(lambda u, rate: jnp.sum(u))
    with pytest.raises(ValueError, match=r"by_mean_size: what it takes the mean of is float32\[\]"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
    with pytest.raises(ValueError, match="packed: by_mean_size looks at whole leaves"):
        adamfn.packed(by_mean_size())
    with pytest.raises(TypeError, match="Stage by_mean_size: mean is 3; expected a function"):
        by_mean_size(3)


def test_it_differentiates_and_maps():
    tx = adamfn.with_backend(by_mean_size(), "pallas")

    def moved(u):
        return tx.update(u, tx.init(u))[0]

    u = jnp.array([[1.0, 3.0], [2.0, 2.0]])
    np.testing.assert_allclose(jax.vmap(moved)(u), u / 4, rtol=1e-6)
    _, tangent = jax.jvp(moved, (u[0],), (u[0],))
    np.testing.assert_allclose(tangent, 0, atol=1e-6)  # it does not depend on the scale
