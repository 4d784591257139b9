# SPDX-License-Identifier: Apache-2.0
"""The tables of what a newcomer waits for, of the demo, and of the native code's settings."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def first_step() -> str:
    """Seconds from a new process to the end of its first step."""
    results = json.loads((RESULTS / "first_step.json").read_text())["results"]
    rows = []
    for tree, caches in results.items():
        for cache, peers in caches.items():
            for peer, row in peers.items():
                s, ratio = row["seconds"], row["times_optax"]
                cells = [s["import"], s["init"], s["trace"] + s["lower"], s["compile"], s["run"]]
                shown = " | ".join(f"{cell:.2f}" for cell in cells)
                rows.append(
                    f"| {tree}, {cache} cache | {peer} | {shown} | {row['total']:.2f} |"
                    f" {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) |"
                )
    head = "| AdamW of | by | import | init | trace, lower | compile | run | total | of optax's |"
    return "\n".join([head, "|---" * 9 + "|", *rows])


def demo() -> str:
    """What examples/digits.py prints, over its seeds."""
    rows = []
    for name, row in json.loads((RESULTS / "demo.json").read_text())["runs"].items():
        accuracy, spread = (100 * row[key] for key in ("accuracy", "spread"))
        rows.append(
            f"| {name} | {accuracy:.2f} ± {spread:.2f} % | {row['state_bytes'] / 1e3:,.0f} kB |"
            f" {1e3 * row['per_step']:.2f} ms | {row['to_first_step']:.1f} s |"
        )
    head = "| optimizer | test accuracy | optimizer state | a step | to the first step |"
    return "\n".join([head, "|---|---|---|---|---|", *rows])


def native_sweep() -> str:
    """The least and the most, over all trees, of each setting's speed beside what ships."""
    lines = []
    for path in sorted((RESULTS / "native_sweep").glob("*.json")):
        results = json.loads(path.read_text())["results"]
        formats = list(next(iter(results.values())))
        settings = list(next(iter(results.values()))[formats[0]]["seconds"])[1:]
        lines += [f"On `{path.stem}`:", "", f"| setting | {' | '.join(formats)} |"]
        lines.append("|---" * (1 + len(formats)) + "|")
        for name in settings:
            cells = []
            for format in formats:
                ratios = [
                    tree[format]["times_as_fast"][name]["median"] for tree in results.values()
                ]
                cells.append(f"{min(ratios):.2f} to {max(ratios):.2f}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
