# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of eight devices is restored on four, on one, and on eight in another layout."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType

import adamfn
from adamfn.interop.orbax import check_saved
from adamfn.sharding import state_shardings

PARAMS = {"kernel": np.full((64, 256), 0.5, np.float32), "bias": np.zeros(256, np.float32)}
OPTIMIZERS = {name: adamfn.adamw(1e-3, moments=name) for name in ("float32", "bfloat16", "8bit")}


def start():
    """Three runs of the same parameters."""
    return {name: {"params": PARAMS, "state": tx.init(PARAMS)} for name, tx in OPTIMIZERS.items()}


def layout(devices, zero_axis="data"):
    mesh = jax.make_mesh(
        (devices,), ("data",), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,)
    )
    everywhere = jax.NamedSharding(mesh, jax.P())
    return {
        name: {
            "params": jax.tree.map(lambda _: everywhere, PARAMS),
            "state": state_shardings(tx, PARAMS, everywhere, zero_axis),
        }
        for name, tx in OPTIMIZERS.items()
    }


def advance(runs, shardings):
    """One step of each run."""

    def step(runs):
        grads = {
            name: jnp.sin(1 + jnp.arange(p.size, dtype=jnp.float32).reshape(p.shape))
            for name, p in PARAMS.items()
        }
        moved = {}
        for name, tx in OPTIMIZERS.items():
            params, state = runs[name]["params"], runs[name]["state"]
            updates, state = tx.update(grads, state, params)
            moved[name] = {"params": adamfn.apply_updates(params, updates), "state": state}
        return moved

    return jax.jit(step, out_shardings=shardings)(runs)


def same(a, b):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_saved_on_eight_restored_on_four_and_one(tmp_path):
    on_eight = layout(8)
    runs = advance(jax.jit(start, out_shardings=on_eight)(), on_eight)
    further = advance(runs, on_eight)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.StandardSave(runs))
        manager.wait_until_finished()
        for devices, zero_axis in ((8, None), (4, "data"), (1, "data")):
            shardings = layout(devices, zero_axis)
            like = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                jax.eval_shape(start),
                shardings,
            )
            check_saved(manager.item_metadata(1), like)
            found = manager.restore(1, args=ocp.args.StandardRestore(like))
            assert jax.tree.structure(found) == jax.tree.structure(runs)
            for leaf, sharding in zip(*map(jax.tree.leaves, (found, shardings)), strict=True):
                assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            same(found, runs)
            if devices == 4:
                same(advance(found, shardings), further)
