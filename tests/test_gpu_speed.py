# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a GPU's speed, on a CPU in its stead: it runs, records and is drawn."""

import json
import sys
from pathlib import Path

import jax
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import gpu_candidates
import gpu_speed
import gpu_tables
from ahead_of_time.candidates import candidates


def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="JAX found no GPU here, only cpu; this measures a GPU"):
        gpu_speed.main([])


def test_what_it_records_is_what_its_tables_draw(tmp_path, monkeypatch):
    out = tmp_path / "gpu_speed.json"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(gpu_speed, "COPIED", 2**12)
    monkeypatch.setattr(gpu_speed, "repeats", lambda run: 1)
    monkeypatch.setattr(gpu_speed, "quieten", lambda: None)
    monkeypatch.setattr(gpu_speed, "TREES", {"one": {"w": (64, 256)}, "other": {"b": (300,)}})
    monkeypatch.setattr(gpu_candidates, "TORCH", {})

    def few(dtype, platform):
        return {
            name: candidate
            for name, candidate in candidates(dtype, platform).items()
            if name in ("optax", "step 8bit")
        }

    monkeypatch.setattr(gpu_speed, "candidates", few)
    for tree in gpu_speed.TREES:
        gpu_speed.main(
            ["--trees", tree, "--dtypes", "bfloat16", "--rounds", "2", "--out", str(out)]
        )
    recorded = json.loads(out.read_text())
    assert {*recorded["updates"]} == {"one", "other"}
    rows = recorded["updates"]["one"]["bfloat16"]
    blocks, n = 64, 64 * 256
    assert rows["optax"]["least"] == 2 * (6 * n + 4) + 2 * n  # params, mu and nu in bfloat16; count
    assert rows["step 8bit"]["least"] == 2 * (4 * n + 12 * blocks + 12) + 2 * n  # count, rates
    assert all(row["seconds"] > 0 for row in rows.values())
    monkeypatch.setattr(gpu_tables, "RESULTS", tmp_path)
    head, _, *lines = gpu_tables.gpu_speed().splitlines()
    assert head == "| Adam implementation | one, bfloat16 | other, bfloat16 |"
    assert {line.count("|") for line in lines} == {4}
    assert sum(" ms, " in line for line in lines) == 2
    assert gpu_tables.gpu_measured_on().startswith("cpu; a copy runs at ")
