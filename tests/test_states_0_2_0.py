# SPDX-License-Identifier: Apache-2.0
"""States that adamfn 0.2.0 saved go on here: `data/make_state_0_2_0.py` recorded them."""

import runpy
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamfn
from adamfn.interop import restore

RECORDED = runpy.run_path(str(Path(__file__).parent / "data" / "make_state_0_2_0.py"))
RUNS = RECORDED["runs"]()


def recorded(prefix):
    with np.load(RECORDED["FILE"]) as data:
        return {key.removeprefix(prefix): data[key] for key in data if key.startswith(prefix)}


def nested(flat):
    """Dictionaries in one another, as msgpack and orbax without a target give them."""
    tree = {}
    for path, leaf in flat.items():
        *outer, last = path.split("/")
        part = tree
        for key in outer:
            part = part.setdefault(key, {})
        part[last] = leaf
    return tree


def by_position(flat):
    """Lists in one another, as states were that had lost the names of their fields."""
    fields = {"count": 0, "mu": 1, "nu": 2, "stage": 1, "learning_rate": 0, "correction": 0}
    fields |= {"scale": 0, "top": 1, "step": 2, "leaves": 0, "buffers": 1, "rows": 0, "columns": 1}
    fields |= {"nu_max": 3, "scales": 4 if any("nu_max" in path for path in flat) else 3}

    def position(path):
        return "/".join(str(fields.get(key, key)) for key in path.split("/"))

    return nested({position(path): leaf for path, leaf in flat.items()})


@pytest.mark.parametrize("name", RUNS)
def test_a_state_of_0_2_0_goes_on(name):
    tx, params = RUNS[name]
    flat = recorded(f"{name}/state/")
    state, *others = (
        restore(arrange(flat), into=tx.init(params)) for arrange in (dict, nested, by_position)
    )
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    for other in others:
        chex.assert_trees_all_equal(other, state)
    grads = RECORDED["gradient"](params, RECORDED["STEPS"])
    updates, state = jax.jit(tx.update)(grads, state, params)
    moved = adamfn.apply_updates(params, updates)
    found = RECORDED["named"]("", jax.tree.map(RECORDED["sample"], moved))
    expected = recorded(f"{name}/next")
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=3e-7, err_msg=path)
    if "rate" not in name:  # with moments of zero it would have gone elsewhere
        fresh, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        gaps = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), fresh, updates)
        assert max(jax.tree.leaves(gaps)) > 1e-3


def test_a_damaged_state_of_0_2_0_is_named():
    tx, params = RUNS["8bit"]
    flat = recorded("8bit/state/")
    del flat["0/scales/3/0/top"]
    with pytest.raises(ValueError, match="at 0/scales/layers/1/kernel/0/top the tree has nothing"):
        restore(flat, into=tx.init(params))


def test_places_without_codes_need_not_be_saved():
    tx, params = RUNS["4bit"]
    state = tx.init(params)
    flat = {path[1:]: leaf for path, leaf in RECORDED["named"]("", state).items() if leaf.size}
    found = restore(flat, into=jax.eval_shape(tx.init, params))
    jax.tree.map(np.testing.assert_array_equal, found, state)
    assert found[0].mu["layers"][1]["kernel"] is None
    assert found[0].mu["bias"].dtype == jnp.float32
