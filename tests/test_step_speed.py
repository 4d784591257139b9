# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a step's speed: it runs, records what its tables are made from, and is fair."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import step_candidates
import step_cost
import step_picture
import step_speed
import step_tables


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "step_speed.json"
    run = "--trees MLP --exponents 10 --rounds 2 --cost-rounds 1 --no-peers --out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_speed, "LEAST", 0.0)
        patch.setattr(jax, "clear_caches", lambda: None)  # other tests' too
        step_speed.main([*run.split(), str(out)])
    return out


def test_it_records_who_took_part_on_what_and_how_fast(recorded):
    found = json.loads(recorded.read_text())
    assert {"machine", "versions", "runs", "rounds", "trees", "updates", "sizes", "cost"} == {
        *found
    }
    assert found["trees"] == {"MLP": {"leaves": 16, "parameters": 463114}}
    limits = {"seven streams"} if found["runs"] == "native" else set()
    jax_ones = {*step_candidates.CANDIDATES}
    assert {*found["updates"]["MLP"]} == jax_ones | limits | {"empty call"}
    assert {*found["updates"]["MLP, training step"]} == jax_ones
    assert {*found["sizes"]["1024"]} == {"optax", "adamfn update", "adamfn step"} | limits
    for row in found["updates"]["MLP"].values():
        assert row["seconds"] > 0
        assert {*row["times_as_fast_as"]} == {"optax", "adamfn step"} | limits
        for ratio in row["times_as_fast_as"].values():
            assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    assert {*found["cost"]["MLP"]} == {*step_cost.MEASURED}
    for row in found["cost"]["MLP"].values():
        assert {*row["seconds"]} == {"trace", "lower", "compile", "first_step"}
        assert {*row["times_cheaper_than_optax"]} == {"trace_and_lower", "compile"}
        assert row["temporary_bytes"] >= 0


def test_tables_and_picture_are_made_of_it(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(step_tables, "RESULTS", recorded.parent)
    for table in (step_tables.step_speed, step_tables.step_variants, step_tables.step_limits):
        head, _, *rows = table().splitlines()
        assert any(row.startswith("| MLP |") for row in rows)
        assert {row.count("|") for row in rows} == {head.count("|")}
    assert step_tables.step_cost().count("| MLP |") == len(step_cost.MEASURED)
    goals = step_tables.step_goals()
    for goal in ("vs optax: MLP |", "8bit vs"):
        assert goal in goals
    step_picture.draw(json.loads(recorded.read_text()), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_ratio_is_taken_round_by_round():
    assert step_speed.spread([2.0, 12.0, 9.0], [1.0, 2.0, 3.0]) == {
        "median": 3.0,
        "min": 2.0,
        "max": 6.0,
    }


@pytest.mark.parametrize(
    "name", ["adamfn update", "adamfn step", "adamfn packed", "adamfn step, XLA"]
)
def test_candidates_take_the_same_step(name):
    def run(candidate):
        params = {"leaf": jnp.zeros(64)}
        state = candidate.init(params)
        for g in np.random.default_rng(0).standard_normal((3, 64), np.float32):
            params, state = candidate.step(params, state, {"leaf": jnp.asarray(g)})
        return params["leaf"]

    expected = run(step_candidates.CANDIDATES["optax"])
    # optax's first bias corrections are 2e-5 off, of rates that add up to 3e-3.
    np.testing.assert_allclose(
        run(step_candidates.CANDIDATES[name]), expected, rtol=3e-5, atol=1e-7
    )


def test_the_empty_call_passes_every_array_and_keeps_them():
    grads = step_candidates.gradients({"a": (3,), "b": (2, 2)})
    params, state = step_candidates.start(step_candidates.CANDIDATES["adamfn step"], grads)
    lowered = step_candidates.empty_step.lower(params, state, grads)
    passed = lowered.compile().memory_analysis().argument_size_in_bytes
    assert passed == sum(x.nbytes for x in jax.tree.leaves((params, state, grads)))
    expected = jax.tree.map(np.array, (params, state))  # copies: a view would forbid donation
    given_back = step_candidates.empty_step(params, state, grads)
    jax.tree.map(np.testing.assert_array_equal, given_back, expected)
    assert jax.tree.leaves(params)[0].is_deleted()


@pytest.mark.parametrize(
    ("tree", "leaves", "parameters"),
    [("GPT-2 small", 148, 124439808), ("ResNet-50", 161, 25557032), ("MLP", 16, 463114)],
)
def test_trees_are_the_models(tree, leaves, parameters):
    expected = {"leaves": leaves, "parameters": parameters}
    assert step_speed.size(step_speed.TREES[tree]()) == expected
