# SPDX-License-Identifier: Apache-2.0
"""The picture of what an update moves on accelerators, and what it needs besides."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from accelerator_tables import FLASHOPTIM, FORMATS, LARGE, MACHINES, OPTAX

LEAST, MORE, TEMPORARY = "#1f6fb4", "#a9cdee", "#e0a458"


def draw(recorded: dict[str, Any], path: Path) -> None:
    """A panel for each machine: bars of bytes a parameter, for each way to do Adam."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    trees = {name: recorded["updates"].get(name, {}).get(LARGE, {}) for name in MACHINES}
    panels = {name: tree["float32"] for name, tree in trees.items() if "float32" in tree}
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.6 * len(panels) + 1.2, 3.8), layout="constrained",
        sharey=True, sharex=True, squeeze=False,
    )  # fmt: skip
    names = [OPTAX, *(f"step {moments}" for moments in FORMATS), FLASHOPTIM]
    for panel, (machine, rows) in zip(axes[0], panels.items(), strict=True):
        draw_machine(panel, rows, names)
        panel.set_title(recorded["machines"][machine]["name"], fontsize=10)
    axes[0][0].set(yticks=range(len(names)), yticklabels=[n.removeprefix("step ") for n in names])
    axes[0][0].invert_yaxis()
    figure.supxlabel("bytes a parameter", fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_machine(panel: Any, rows: dict[str, Any], names: list[str]) -> None:
    """What must be moved, what is moved beyond it, and temporaries beneath."""
    found = [(i, rows[name]) for i, name in enumerate(names) if "moved" in rows.get(name, {})]
    places = [i for i, _ in found]
    least = [row["least"] for _, row in found]
    more = [max(0, row["moved"] - row["least"]) for _, row in found]
    above, beneath = [i - 0.14 for i in places], [i + 0.3 for i in places]
    panel.barh(above, least, 0.5, color=LEAST, label="must be moved")
    panel.barh(above, more, 0.5, left=least, color=MORE, label="moved beyond that")
    temporary = [row["temporary"] for _, row in found]
    panel.barh(beneath, temporary, 0.3, color=TEMPORARY, label="temporary memory")
    panel.grid(axis="x", alpha=0.25)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
