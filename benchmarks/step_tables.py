# SPDX-License-Identifier: Apache-2.0
"""The tables of a step's speed, from `benchmarks/results/step_speed.json`."""

import json
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
OPTAX, TORCH, STREAMS, EMPTY = "optax", "torch fused", "seven streams", "empty call"
UPDATE, STEP, PACKED = "adamfn update", "adamfn step", "adamfn packed"
STEP_BFLOAT16, STEP_8BIT, STEP_XLA = (f"{STEP}, {more}" for more in ("bfloat16", "8bit", "XLA"))


class Goal(NamedTuple):
    """A target: how many times as fast, or as cheap, one candidate must be as another."""

    ratio: float
    base: str
    name: str = STEP
    cost: str = ""
    """The stages to compare before the first step; none for the step itself."""
    trees: tuple[str, ...] = ()
    """If none is named: all but whole training steps."""


GOALS = (
    Goal(1.5, OPTAX, trees=("ResNet-50", "1000 leaves of 1000", "MLP")),
    Goal(1.8, OPTAX, name=PACKED, trees=("1000 leaves of 1000",)),
    Goal(1.0, TORCH),
    Goal(0.9, STREAMS, trees=("one leaf of 2^25",)),
    Goal(0.5, STEP, name=STEP_8BIT),
    Goal(1.0, STEP, name=STEP_BFLOAT16, trees=("GPT-2 small", "ResNet-50", "one leaf of 2^25")),
    Goal(4.0, OPTAX, name=UPDATE, cost="trace_and_lower", trees=("1000 leaves of 1000",)),
    Goal(10.0, OPTAX, name=PACKED, cost="trace_and_lower", trees=("1000 leaves of 1000",)),
)


def step_speed() -> str:
    """Speed of an update relative to optax."""
    recorded = _recorded()
    names = (TORCH, UPDATE, STEP, PACKED)
    lines = []
    for tree, rows in recorded["updates"].items():
        cells = " | ".join(_ratio(rows, name, OPTAX) for name in names)
        lines.append(f"| {tree} | {1e3 * rows[OPTAX]['seconds']:.2f} ms | {cells} |")
    head = "| update of | optax time | " + " | ".join(names) + " |"
    return "\n".join([head, "|---" * (2 + len(names)) + "|", *lines])


def step_variants() -> str:
    """The step with other formats and through XLA: speed relative to optax."""
    recorded = _recorded()
    names = (STEP_BFLOAT16, STEP_8BIT, STEP_XLA)
    lines = [
        f"| {tree} | {' | '.join(_ratio(rows, name, OPTAX) for name in names)} |"
        for tree, rows in recorded["updates"].items()
    ]
    head = "| update of | " + " | ".join(names) + " |"
    return "\n".join([head, "|---" * (1 + len(names)) + "|", *lines])


def step_limits() -> str:
    """The step compared with the limits of the machine."""
    lines = []
    for tree, rows in _recorded()["updates"].items():
        if STREAMS in rows or EMPTY in rows:
            empty = f"{1e3 * rows[EMPTY]['seconds']:.3f} ms" if EMPTY in rows else ""
            lines.append(
                f"| {tree} | {1e3 * rows[STEP]['seconds']:.3f} ms |"
                f" {_ratio(rows, STEP, STREAMS)} | {empty} | {_ratio(rows, EMPTY, OPTAX)} |"
            )
    head = (
        "| update of | adamfn step | speed relative to seven streams | empty call"
        " | its speed relative to optax |"
    )
    return "\n".join([head, "|---|---|---|---|---|", *lines])


def step_cost() -> str:
    """Seconds and memory before the first step has run."""
    lines = []
    for tree, rows in _recorded()["cost"].items():
        for name, row in rows.items():
            seconds, cheaper = row["seconds"], row["times_cheaper_than_optax"]["trace_and_lower"]
            memory = row["temporary_bytes"]
            lines.append(
                f"| {tree} | {name} | {seconds['trace'] + seconds['lower']:.3f} s |"
                f" {_spread(cheaper)} | {seconds['compile']:.2f} s |"
                f" {1e3 * seconds['first_step']:.1f} ms |"
                f" {'' if memory is None else f'{memory / 2**10:.1f} KiB'} |"
            )
    head = (
        "| update of | Adam implementation | trace + lower | times cheaper than optax | compile |"
        " first step | temporary memory |"
    )
    return "\n".join([head, "|---|---|---|---|---|---|---|", *lines])


def step_goals() -> str:
    """Targets and measurements."""
    recorded, lines = _recorded(), []
    for goal in GOALS:
        updates = [tree for tree in recorded["updates"] if not tree.endswith("training step")]
        for tree in goal.trees or updates:
            found = _found(recorded, goal, tree)
            if found is None:
                continue
            short = 1 - found["median"] / goal.ratio
            cost = f", {goal.cost.replace('_and_', ' and ')}," if goal.cost else ""
            lines.append(
                f"| {goal.name}{cost} vs {goal.base}: {tree} | {goal.ratio} |"
                f" {_spread(found)} | {'yes' if short <= 0 else f'no, {short:.0%} short'} |"
            )
    head = "| relative speed | target | measured | reached |"
    return "\n".join([head, "|---|---|---|---|", *lines])


def _recorded() -> dict[str, Any]:
    return json.loads((RESULTS / "step_speed.json").read_text())


def _found(recorded: dict[str, Any], goal: Goal, tree: str) -> dict[str, float] | None:
    if goal.cost:
        row = recorded["cost"].get(tree, {}).get(goal.name)
        return row and row["times_cheaper_than_optax"][goal.cost]
    row = recorded["updates"].get(tree, {}).get(goal.name)
    return row and row["times_as_fast_as"].get(goal.base)


def _ratio(rows: dict[str, Any], name: str, base: str) -> str:
    found = rows.get(name, {}).get("times_as_fast_as", {}).get(base)
    return _spread(found) if found else ""


def _spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
