# SPDX-License-Identifier: Apache-2.0
"""The picture of a step's speed: how many times as fast as optax's, and how cost grows."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from step_tables import OPTAX, PACKED, STEP, STREAMS, TORCH, UPDATE

COLORS = {
    OPTAX: "#8a8a8a",
    TORCH: "#e0a458",
    UPDATE: "#8fbbe8",
    STEP: "#1f6fb4",
    PACKED: "#7a4ea3",
    STREAMS: "#222222",
}


def draw(recorded: dict[str, Any], path: Path) -> None:
    """Bars for each tree, and lines over the size of one leaf."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, lines) = plt.subplots(
        1, 2, figsize=(11, 4.8), layout="constrained", width_ratios=(1.25, 1)
    )
    draw_ratios(bars, recorded["updates"])
    draw_sizes(lines, recorded["sizes"])
    for panel in (bars, lines):
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_ratios(panel: Any, updates: dict[str, Any]) -> None:
    names = (TORCH, UPDATE, STEP, PACKED)
    height = 0.8 / len(names)
    for k, name in enumerate(names):
        found = [
            (place, rows[name]["times_as_fast_as"][OPTAX])
            for place, rows in enumerate(updates.values())
            if name in rows
        ]
        places = [place + (k - (len(names) - 1) / 2) * height for place, _ in found]
        medians = [ratio["median"] for _, ratio in found]
        reach = [
            [ratio["median"] - ratio["min"] for _, ratio in found],
            [ratio["max"] - ratio["median"] for _, ratio in found],
        ]
        panel.barh(places, medians, height, color=COLORS[name], label=name)
        panel.errorbar(medians, places, xerr=reach, fmt="none", ecolor="#444444", elinewidth=0.8)
    panel.axvline(1, color=COLORS[OPTAX], linewidth=1.2)
    panel.set(
        yticks=range(len(updates)),
        yticklabels=list(updates),
        xlabel="times as fast as optax.adam (median, least to most)",
    )
    largest = max(
        row["times_as_fast_as"][OPTAX]["median"]
        for rows in updates.values()
        for name, row in rows.items()
        if name in names
    )
    panel.set_xlim(0, 1.25 * largest)  # a round that something else disturbed runs out of it
    panel.invert_yaxis()
    panel.grid(axis="x", alpha=0.25)
    panel.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=9)


def draw_sizes(panel: Any, sizes: dict[str, Any]) -> None:
    for name, color in COLORS.items():
        found = [(int(n), 1e6 * rows[name]["seconds"]) for n, rows in sizes.items() if name in rows]
        if found:
            style = "--" if name == STREAMS else "o-"
            panel.plot(*zip(*found, strict=True), style, color=color, markersize=4, label=name)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set(xlabel="elements of one leaf", ylabel="microseconds of an update")
    panel.grid(alpha=0.25)
    panel.legend(frameon=False, fontsize=9)
