# SPDX-License-Identifier: Apache-2.0
"""The tables of an update's cost on accelerators, from `benchmarks/results/accelerators.json`."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FORMATS = ("float32", "bfloat16", "8bit", "4bit", "factored", "blockmean")
OPTAX, FLASHOPTIM = "optax", "flashoptim-jax"
LARGE = "large matrix"
MACHINES = ("v5e", "v5p", "v6e", "h100", "b200")


def accelerators() -> str:
    """One large float32 matrix by `step`, on a TPU and a GPU."""
    return _by_machine("step", ("v5e", "h100"))


def accelerators_step() -> str:
    """The same on every machine."""
    return _by_machine("step", MACHINES)


def accelerators_update() -> str:
    """By `update` and `apply_updates`."""
    return _by_machine("update", MACHINES)


def accelerators_tpu() -> str:
    """Every tree by `step` on TPU v5e."""
    return _by_tree("v5e")


def accelerators_gpu() -> str:
    """Every tree by `step` on H100."""
    return _by_tree("h100")


def accelerators_mesh() -> str:
    """State, memory and collectives of one chip of a mesh, for each format."""
    recorded = _recorded()
    lines = []
    found = [
        (topology, layout, rows)
        for topology, layouts in recorded.get("meshes", {}).items()
        for layout, rows in layouts.items()
    ]
    for topology, layout, rows in found:
        name = f"{recorded['machines'][topology]['name']}, {topology} | {layout}"
        whole = _held(rows.get("step float32", {}))
        for moments in FORMATS:
            row = rows.get(f"step {moments}")
            if row is None:
                continue
            if "error" in row:
                lines.append(f'| {name} | `"{moments}"` | does not compile | | | | | |')
                continue
            share = f"{_held(row) / whole:.2f}" if whole else ""
            cells = [f"{row[key] / 2**20:,.0f}" for key in ("state", "arguments", "temporary")]
            lines.append(
                f'| {name} | `"{moments}"` | {" | ".join(cells)} | {share} |'
                f" {sum(row['collectives'].values())} | {row['seconds']:.0f} |"
            )
    head = (
        "| mesh | split | moments | state, MiB | arguments, MiB | temporaries, MiB |"
        " arguments + temporaries, relative to float32 | collectives | compile time, s |"
    )
    return "\n".join([head, "|---" * 9 + "|", *lines])


def accelerators_versions() -> str:
    """The machines and the compilers' versions."""
    machines = _recorded()["machines"]
    libraries = {k: v for row in machines.values() for k, v in row.items() if k != "name"}
    names = sorted({row["name"] for row in machines.values()})
    return f"For {', '.join(names)}; {', '.join(f'{k} {v}' for k, v in libraries.items())}."


def _by_machine(way: str, machines: tuple[str, ...]) -> str:
    """One large float32 matrix: bytes moved and temporary bytes per parameter."""
    recorded = _recorded()
    found = {m: recorded["updates"].get(m, {}).get(LARGE, {}).get("float32") for m in machines}
    found = {m: rows for m, rows in found.items() if rows}
    names = [OPTAX, *(f"{way} {moments}" for moments in FORMATS), FLASHOPTIM]
    lines = []
    for name in names:
        rows = [own.get(name) for own in found.values()]
        least = [f"{row['least']:.1f}" for row in rows if row and "least" in row]
        cells = " | ".join(map(_cell, rows))
        lines.append(f"| {_title(name)} | {least[0] if least else ''} | {cells} |")
    head = " | ".join(recorded["machines"][machine]["name"] for machine in found)
    return "\n".join(
        [f"| Adam implementation | minimum | {head} |", "|---" * (2 + len(found)) + "|", *lines]
    )


def _by_tree(machine: str) -> str:
    """Every tree by `step`: bytes moved and temporary bytes per parameter."""
    names = [OPTAX, *(f"step {moments}" for moments in FORMATS), FLASHOPTIM]
    lines = [
        f"| {tree}, {dtype} | {' | '.join(_cell(rows.get(name)) for name in names)} |"
        for tree, dtypes in _recorded()["updates"].get(machine, {}).items()
        for dtype, rows in dtypes.items()
    ]
    head = " | ".join(map(_title, names))
    return "\n".join([f"| parameters | {head} |", "|---" * (1 + len(names)) + "|", *lines])


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "error" in row:
        return "does not compile"
    return f"{row['moved']:.1f} / {row['temporary']:.1f}"


def _title(name: str) -> str:
    return name if name in (OPTAX, FLASHOPTIM) else f'`"{name.split()[-1]}"`'


def _held(row: dict[str, Any]) -> int:
    return row.get("arguments", 0) + row.get("temporary", 0)


def _recorded() -> dict[str, Any]:
    return json.loads((RESULTS / "accelerators.json").read_text())
