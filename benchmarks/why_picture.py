# SPDX-License-Identifier: Apache-2.0
"""The picture at the top of README and Home: bytes of state, and the time of a step on a GPU."""

import json
from pathlib import Path
from statistics import mean

import matplotlib as mpl

RESULTS = Path(__file__).parent / "results"
COLORS = {"torch": "#e0a458", "optax": "#8a8a8a", "adamfn": "#8fbbe8", "adamfn, 8 bits": "#1f6fb4"}


def draw(path: Path) -> None:
    """Bars, with their figures beside them: readable at the width of a phone."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    runs = json.loads((RESULTS / "lean_quality.json").read_text())["runs"]
    wide, lean = (
        mean(run["bytes_a_parameter"] for run in runs if run["moments"] == name)
        for name in ("float32", "8bit")
    )
    updates = json.loads((RESULTS / "gpu_speed.json").read_text())["updates"]
    rows = updates["large matrix"]["float32"]
    names = ("torch fused", "optax", "step float32", "step 8bit")
    times = [1e3 * rows[name]["seconds"] for name in names]
    figure, panels = plt.subplots(1, 2, figsize=(7.2, 2.3), layout="constrained", sharey=True)
    for panel, values, title in zip(
        panels,
        ([wide, wide, wide, lean], times),
        ("optimizer state,\nbytes per parameter", "a step of 268M parameters\non an H100, ms"),
        strict=True,
    ):
        bars = panel.barh(list(COLORS), values, color=COLORS.values())
        panel.bar_label(bars, [f"{value:.2f}" for value in values], padding=4, fontsize=12)
        panel.set_title(title, fontsize=12)
        panel.set(xticks=[], xlim=(0, 1.2 * max(values)))
        panel.tick_params(left=False, labelsize=12)
        panel.spines[:].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=160)
    plt.close(figure)
