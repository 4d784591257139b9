# SPDX-License-Identifier: Apache-2.0
"""The notebooks run, and print what is committed with them."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "adam_from_the_formulas.ipynb"
NUMBER = re.compile(r"\s*[-+]?(?:\d+\.\d*|\.\d+)(?:e[-+]?\d+)?\s*")  # and what pads it
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def committed(cell):
    """What a cell printed."""
    return "".join("".join(out["text"]) for out in cell["outputs"] if "text" in out)


@pytest.fixture(scope="module")
def printed():
    """What each cell prints, run in one process without a kernel."""
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    names, texts = {"__name__": "notebook"}, []
    with pytest.MonkeyPatch.context() as patch, matplotlib.rc_context():
        patch.chdir(NOTEBOOK.parent)
        for cell in CELLS:
            with contextlib.redirect_stdout(io.StringIO()) as text:
                exec("".join(cell["source"]), names)
            texts.append(text.getvalue())
        plt.close("all")
    return texts


def test_it_prints_what_is_committed(printed):
    for cell, text in zip(CELLS, printed, strict=True):
        assert NUMBER.sub("#", text) == NUMBER.sub("#", committed(cell))
        found = [float(number) for number in NUMBER.findall(text)]
        expected = [float(number) for number in NUMBER.findall(committed(cell))]
        # Printed digits, of which the last may differ from machine to machine.
        assert found == pytest.approx(expected, rel=1e-5, abs=0.011 if "distance" in text else 2e-6)


@pytest.mark.parametrize("name", ["a_torch_run_taken_over", "lean_transformer_on_a_mesh"])
def test_it_prints_what_is_committed_in_a_process_with_its_devices(name):
    path = NOTEBOOK.with_name(f"{name}.ipynb")
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join("".join(cell["source"]) for cell in cells)],
        env=os.environ
        | {"MPLBACKEND": "agg", "PYTHONPATH": str(NOTEBOOK.parent.parent)}
        | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
        cwd=path.parent,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert ran.stdout == "".join(map(committed, cells))
    assert [
        number for number, cell in enumerate(cells, 1) if cell["execution_count"] != number
    ] == []
    drawn = [out for cell in cells for out in cell["outputs"] if "image/png" in out.get("data", {})]
    assert len(drawn) == sum("plt.show()" in "".join(cell["source"]) for cell in cells)


def test_its_losses_are_the_ones_beside_them():
    rows = next(text for text in map(committed, CELLS) if text.startswith("epoch")).splitlines()
    pairs = [row.split()[1:] for row in rows[1:]]
    assert len(pairs) == 10
    for ours, theirs in pairs:
        # One unit of the last printed digit, in exact arithmetic.
        assert abs(int(ours.replace(".", "")) - int(theirs.replace(".", ""))) <= 1


def test_it_is_committed_with_its_outputs():
    assert NOTEBOOK.stat().st_size < 300_000
    drawn = [out for cell in CELLS for out in cell["outputs"] if "image/png" in out.get("data", {})]
    assert len(drawn) == 3
    for number, cell in enumerate(CELLS, start=1):
        assert cell["execution_count"] == number
