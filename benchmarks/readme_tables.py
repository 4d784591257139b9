# SPDX-License-Identifier: Apache-2.0
"""Draws the tables of README.md and docs/ from `benchmarks/results/`, between their markers.

python benchmarks/readme_tables.py           # rewrites the pages and their pictures
python benchmarks/readme_tables.py --check   # exits 1 if it would change
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

from accelerator_tables import (
    accelerators,
    accelerators_gpu,
    accelerators_mesh,
    accelerators_step,
    accelerators_tpu,
    accelerators_update,
    accelerators_versions,
)
from gpu_tables import gpu_measured_on, gpu_speed
from start_tables import demo, first_step, native_sweep
from step_tables import step_cost, step_goals, step_limits, step_speed, step_variants
from why_table import why, why_at_home

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def measured_on() -> str:
    """The machine and the versions of each file of results."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        recorded = json.loads(path.read_text())
        machine, versions = recorded.get("machine", {}), recorded.get("versions", {})
        if not (machine or versions):
            continue
        hardware = ("cores", "machine", "processor", "backend")
        known = {k: v for k, v in machine.items() if k not in hardware} | versions
        libraries = ", ".join(f"{k} {v}" for k, v in known.items())
        processor = machine.get("processor", machine.get("machine", ""))
        cores = f"{processor}, {machine['cores']} cores" if machine else ""
        rows.append(f"| `{path.name}` | {cores} | {libraries} |")
    return "\n".join(["| results | machine | versions |", "|---|---|---|", *rows])


def exactness() -> str:
    """Each library's largest error."""
    recorded = json.loads((RESULTS / "exactness.json").read_text())
    rows = [f"| {name} | {max(errors):.1e} |" for name, errors in recorded["errors"].items()]
    return "\n".join(["| Adam implementation | largest update error |", "|---|---|", *rows])


def trace_cost() -> str:
    """Seconds of tracing and lowering, and their ratio."""
    recorded = json.loads((RESULTS / "trace_cost.json").read_text())
    rows = []
    for tree, result in recorded["results"].items():
        total = {peer: s["trace"] + s["lower"] for peer, s in result["seconds"].items()}
        compiling = {peer: s["compile"] for peer, s in result["seconds"].items()}
        ratio = result["trace_and_lower_ratio"]
        rows.append(
            f"| {tree} | {total['optax']:.2f} s | {total['adamfn']:.2f} s | {ratio['median']:.1f}"
            f" ({ratio['min']:.1f} to {ratio['max']:.1f}) | {compiling['optax']:.1f} s |"
            f" {compiling['adamfn']:.1f} s |"
        )
    head = (
        "| training update of | optax, trace + lower | adamfn, trace + lower | speedup |"
        " optax, compile | adamfn, compile |"
    )
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def lean_quality() -> str:
    """Validation losses, and their change from float32 with the same seed."""
    runs = json.loads((RESULTS / "lean_quality.json").read_text())["runs"]
    losses = {(run["moments"], run["seed"]): run["validation_loss"] for run in runs}
    rows = []
    for name in dict.fromkeys(run["moments"] for run in runs):
        own = [run for run in runs if run["moments"] == name]
        beside = [run["validation_loss"] / losses["float32", run["seed"]] - 1 for run in own]
        shown = ", ".join(f"{run['validation_loss']:.4f}" for run in own)
        rows.append(
            f'| `"{name}"` | {own[0]["bytes_a_parameter"]:.2f} | {shown} | {mean(beside):+.2%} |'
        )
    head = "| moments | bytes per parameter | validation loss, by seed | mean change from float32 |"
    return "\n".join([head, "|---|---|---|---|", *rows])


def lean_fidelity() -> str:
    """Cosine, relative length and largest element of an update, for each spread."""
    rows = json.loads((RESULTS / "lean_fidelity.json").read_text())["rows"]
    spreads = list(next(iter(rows.values()))["spreads"])
    lines = []
    for name, row in rows.items():
        cells = " | ".join(
            f"{c['cosine']:.4f} / {c['relative_length']:.3g} / {c['largest']:.2g}"
            for c in row["spreads"].values()
        )
        lines.append(f"| {name} | {row['bytes_a_parameter']:.2f} | {cells} |")
    head = (
        "| moments | bytes per parameter | "
        + " | ".join(f"{d} decade{'s' * (d != '1')}" for d in spreads)
        + " |"
    )
    return "\n".join([head, "|---" * (2 + len(spreads)) + "|", *lines])


def lean_scales() -> str:
    """Cosine and relative length of an update, for each scale of all gradients."""
    rows = json.loads((RESULTS / "lean_fidelity.json").read_text())["rows"]
    scales = list(next(iter(rows.values()))["scales"])
    lines = []
    for name, row in rows.items():
        cells = " | ".join(
            "not finite"
            if c["cosine"] is None
            else f"{c['cosine']:.3f} / {c['relative_length']:.3g}"
            for c in row["scales"].values()
        )
        lines.append(f"| {name} | {cells} |")
    head = "| moments | " + " | ".join(f"{float(scale):g}" for scale in scales) + " |"
    return "\n".join([head, "|---" * (1 + len(scales)) + "|", *lines])


def weights_quality() -> str:
    """Validation losses for each storage of the weights, and bytes per parameter."""
    recorded = json.loads((RESULTS / "weights_quality.json").read_text())
    runs, held = recorded["runs"], recorded["bytes_a_parameter"]
    losses = {(run["weights"], run["seed"]): run["validation_loss"] for run in runs}
    rows = []
    for name, uses in held.items():
        own = [run for run in runs if run["weights"] == name]
        beside = [run["validation_loss"] / losses["float32", run["seed"]] - 1 for run in own]
        sizes = " | ".join(f"{size:.2f}" for size in (*uses.values(), sum(uses.values())))
        shown = ", ".join(f"{run['validation_loss']:.4f}" for run in own)
        rows.append(
            f"| {name} | {sizes} | {shown} |"
            f" {mean(beside):+.2%} ({min(beside):+.2%} to {max(beside):+.2%}) |"
        )
    uses = " | ".join(f"{use}, bytes" for use in next(iter(held.values())))
    head = f"| weights | {uses} | total | validation loss, by seed | change from float32: mean |"
    return "\n".join([head, "|---" * 8 + "|", *rows])


def lean_speed() -> str:
    """Milliseconds of an update, and their ratio to float32's."""
    results = json.loads((RESULTS / "lean_speed.json").read_text())["results"]
    rows = [
        f"| {name} | {1e3 * r['seconds']:.0f} | {r['ratio_to_float32']['median']:.2f}"
        f" ({r['ratio_to_float32']['min']:.2f} to {r['ratio_to_float32']['max']:.2f}) |"
        for name, r in results.items()
    ]
    head = "| Adam implementation | median time, ms | relative to adamfn float32 |"
    return "\n".join([head, "|---|---|---|", *rows])


def recipes_effect() -> str:
    """Validation losses, and their difference from AdamW with the same seed."""
    runs = json.loads((RESULTS / "recipes_effect.json").read_text())["runs"]
    losses = {(run["recipe"], run["seed"]): run["validation_loss"] for run in runs}
    rows = []
    for name in dict.fromkeys(run["recipe"] for run in runs):
        own = [run for run in runs if run["recipe"] == name]
        beside = [run["validation_loss"] - losses["AdamW", run["seed"]] for run in own]
        shown = ", ".join(f"{run['validation_loss']:.3f}" for run in own)
        rows.append(
            f"| {name} | {shown} | {mean(beside):+.3f} ({min(beside):+.3f} to {max(beside):+.3f}) |"
        )
    head = "| recipe | validation loss, by seed | difference from AdamW: mean (range) |"
    return "\n".join([head, "|---|---|---|", *rows])


def stage_cost() -> str:
    """A step with each stage, relative to AdamW's step."""
    results = json.loads((RESULTS / "stage_cost.json").read_text())["results"]
    rows = [
        f"| `{name}` | {r['ratio']['median']:.2f} ({r['ratio']['min']:.2f} to"
        f" {r['ratio']['max']:.2f}) | {r['temporary_bytes_a_parameter']:.1f} |"
        for name, r in results.items()
    ]
    head = "| AdamW with | time relative to AdamW | temporary bytes per parameter |"
    return "\n".join([head, "|---|---|---|", *rows])


TABLES = {
    "README.md": (why,),
    "docs/accelerators.md": (
        gpu_measured_on,
        gpu_speed,
        accelerators_versions,
        accelerators_step,
        accelerators_update,
        accelerators_tpu,
        accelerators_gpu,
        accelerators_mesh,
    ),
    "docs/index.md": (why_at_home,),
    "docs/benchmarks.md": (
        measured_on,
        exactness,
        step_speed,
        trace_cost,
        first_step,
        demo,
        lean_quality,
        accelerators,
    ),
    "docs/lean_moments.md": (lean_fidelity, lean_scales, lean_speed),
    "docs/recipes.md": (recipes_effect,),
    "docs/sixteen_bit_weights.md": (weights_quality,),
    "docs/speed.md": (
        step_goals,
        step_speed,
        step_variants,
        step_limits,
        step_cost,
        stage_cost,
        native_sweep,
    ),
}
"""The tables of each page."""


def rendered(text: str, tables: Sequence[Callable[[], str]]) -> str:
    """A page's text with each table drawn again between its markers."""
    for table in tables:
        begin, end = f"<!-- {table.__name__} -->", f"<!-- end {table.__name__} -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n{table()}\n{end}{tail}"
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    args = parser.parse_args(argv)
    for name, tables in TABLES.items():
        page = ROOT / name
        text = page.read_text()
        drawn = rendered(text, tables)
        if args.check and drawn != text:
            sys.exit(f"{name} is not up to date: run benchmarks/readme_tables.py")
        if not args.check:
            page.write_text(drawn)
    if not args.check:
        import accelerator_picture  # only these need matplotlib
        import step_picture
        import why_picture

        why_picture.draw(ROOT / "docs" / "why.png")
        for draw, name in (
            (step_picture.draw, "step_speed"),
            (accelerator_picture.draw, "accelerators"),
        ):
            recorded = json.loads((RESULTS / f"{name}.json").read_text())
            draw(recorded, ROOT / "docs" / f"{name}.png")


if __name__ == "__main__":
    main()
