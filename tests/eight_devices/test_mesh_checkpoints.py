"""A checkpoint of eight devices is restored on four, on one, and on eight in another layout."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType

import adamfn
from adamfn.interop.orbax import check_saved
from adamfn.sharding import state_shardings

PARAMS = {"kernel": np.full((64, 256), 0.5, np.float32), "bias": np.zeros(256, np.float32)}


def layout(tx, devices, zero_axis="data"):
    mesh = jax.make_mesh(
        (devices,), ("data",), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,)
    )
    everywhere = jax.NamedSharding(mesh, jax.P())
    return {
        "params": jax.tree.map(lambda _: everywhere, PARAMS),
        "state": state_shardings(tx, PARAMS, everywhere, zero_axis),
    }


def advance(tx, run, shardings, steps):
    @jax.jit
    def step(run):
        grads = jax.tree.map(
            lambda p: jnp.cos(100 * p + jnp.arange(p.size).reshape(p.shape)), run["params"]
        )
        updates, state = tx.update(grads, run["state"], run["params"])
        return {"params": adamfn.apply_updates(run["params"], updates), "state": state}

    step = jax.jit(step, out_shardings=shardings)
    for _ in range(steps):
        run = step(run)
    return run


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "8bit"])
def test_saved_on_eight_restored_on_four_and_one(moments, tmp_path):
    tx = adamfn.adamw(1e-3, moments=moments)
    on_eight = layout(tx, 8)
    params = jax.device_put(PARAMS, on_eight["params"])
    state = jax.jit(tx.init, out_shardings=on_eight["state"])(params)
    run = advance(tx, {"params": params, "state": state}, on_eight, 3)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.StandardSave(run))
        manager.wait_until_finished()
        shapes = jax.eval_shape(lambda: {"params": params, "state": tx.init(params)})
        for devices, zero_axis in ((8, None), (4, "data"), (1, "data")):
            shardings = layout(tx, devices, zero_axis)
            like = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
            )
            check_saved(manager.item_metadata(3), like)
            found = manager.restore(3, args=ocp.args.StandardRestore(like))
            assert jax.tree.structure(found) == jax.tree.structure(run)
            for a, b, s in zip(*map(jax.tree.leaves, (found, run, shardings)), strict=True):
                assert a.sharding.is_equivalent_to(s, a.ndim)
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
            ends = [
                jax.device_get(advance(tx, *args, 2))
                for args in ((found, shardings), (run, on_eight))
            ]
            for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
                np.testing.assert_array_equal(a, b)
