# SPDX-License-Identifier: Apache-2.0
"""The tables of an update's speed on a GPU, from `benchmarks/results/gpu_speed.json`."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FORMATS = ("float32", "bfloat16", "8bit", "4bit", "factored", "blockmean")
BITS = "step 8bit, weights of 24 bits"
NAMES = ("optax", *(f"step {moments}" for moments in FORMATS), BITS, "update 8bit")
PEERS = ("flashoptim-jax", "torch fused", "flashoptim", "torchao 8bit", "bitsandbytes 8bit")


def gpu_speed() -> str:
    """Time of an update of each tree, and its bandwidth relative to a copy."""
    recorded = gpu_recorded()
    copied = recorded["copy_bytes_a_second"]
    columns = [
        (f"{tree}, {dtype}", rows)
        for tree, dtypes in recorded["updates"].items()
        for dtype, rows in dtypes.items()
    ]
    lines = [
        f"| {_title(name)} | {' | '.join(_cell(rows.get(name), copied) for _, rows in columns)} |"
        for name in (*NAMES, *PEERS)
    ]
    head = " | ".join(title for title, _ in columns)
    return "\n".join(
        [f"| Adam implementation | {head} |", "|---" * (1 + len(columns)) + "|", *lines]
    )


def gpu_measured_on() -> str:
    """The card, the bandwidth of a copy, and the versions."""
    recorded = gpu_recorded()
    libraries = ", ".join(f"{name} {version}" for name, version in recorded["versions"].items())
    copied = recorded["copy_bytes_a_second"] / 1e12
    return f"{recorded['card']}; a copy runs at {copied:.2f} TB/s; {libraries}."


def gpu_recorded() -> dict[str, Any]:
    return json.loads((RESULTS / "gpu_speed.json").read_text())


def _title(name: str) -> str:
    way, _, moments = name.partition(" ")
    if name == BITS:
        return '`"8bit"`, bfloat16 weights with `round_weights(24)`'
    if way in ("step", "update"):
        return f'`"{moments}"`' + (", by `update`" if way == "update" else "")
    return name


def _cell(row: dict[str, Any] | None, copied: float) -> str:
    if row is None:
        return ""
    share = row["least"] / row["seconds"] / copied
    return f"{1e3 * row['seconds']:.2f} ms, {share:.2f}"
