# SPDX-License-Identifier: Apache-2.0
"""The benchmark of accelerators records what its tables and its picture are made from."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import accelerator_picture
import accelerator_tables
import accelerators

RUN = ["--machines", "cpu", "--trees", "large matrix", "--dtypes", "float32", "--out"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "accelerators.json"
    accelerators.main([*RUN, str(out), "--only", "step float32"])
    accelerators.main([*RUN, str(out), "--only", "optax"])
    return out


def test_runs_add_to_what_is_recorded(recorded):
    rows = json.loads(recorded.read_text())["updates"]["cpu"]["large matrix"]["float32"]
    assert list(rows) == ["step float32", "optax"]
    for row in rows.values():
        assert row["least"] == 28
        assert row["moved"] >= 28
    assert recorded.read_text().count("\n") < 20  # a row is a line


def test_tables_and_picture_show_it(recorded, monkeypatch, tmp_path):
    monkeypatch.setattr(accelerator_tables, "RESULTS", recorded.parent)
    monkeypatch.setattr(accelerator_tables, "MACHINES", ("cpu",))
    monkeypatch.setattr(accelerator_picture, "MACHINES", ("cpu",))
    row = json.loads(recorded.read_text())["updates"]["cpu"]["large matrix"]["float32"]["optax"]
    cells = f"| optax | 28.0 | {row['moved']:.1f} / {row['temporary']:.1f} |"
    assert cells in accelerator_tables.accelerators_step()
    accelerator_picture.draw(json.loads(recorded.read_text()), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_compile_is_recorded_as_such():
    def fails():
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand more")

    row = accelerators.attempt(fails)
    assert row == {"error": "RuntimeError: RESOURCE_EXHAUSTED: out of memory"}


def test_an_unknown_machine_is_one_sentence(capsys):
    with pytest.raises(SystemExit):
        accelerators.main(["--machines", "v9"])
    assert "'v9' is unknown" in capsys.readouterr().err
