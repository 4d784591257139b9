# SPDX-License-Identifier: Apache-2.0
"""What storing Adam's moments in fewer bytes does to training: examples/char_lm.py, every format.

800 steps on each of three seeds. The result of every run is written when it ends, and runs that are
there already are not made again: an interruption loses one run at most. After a change to adamfn,
`--fresh` starts over.

    python benchmarks/lean_quality.py            # writes benchmarks/results/lean_quality.json
                                                 # and docs/lean_quality.png
    python benchmarks/lean_quality.py --moments float32 8bit --seeds 0 --steps 100 --out /tmp
"""

import argparse
import json
import runpy
import time
from pathlib import Path
from statistics import mean, stdev

import jax
import matplotlib as mpl
from lean import BENCHMARKS, DOCS, FORMATS, RESULTS, machine, save, versions
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

SEEDS, STEPS = (0, 1, 2), 800
EXAMPLE = BENCHMARKS.parent / "examples" / "char_lm.py"


def measure(train, moments: str, seed: int, steps: int, bar: Progress) -> dict:
    """Makes one run, with a line in the progress bar."""
    task = bar.add_task(f"{moments:9s} seed {seed}", total=steps, report="")
    began = time.perf_counter()
    run = train(
        moments,
        steps,
        seed,
        lambda step, loss: bar.update(task, completed=step, report=f"loss {loss:.3f}"),
    )
    seconds = time.perf_counter() - began
    bar.update(task, completed=steps, report=f"validation loss {run.validation_loss:.4f}")
    # Every array of the state but the counts and the rate, which are scalars.
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(run.state) if leaf.ndim)
    return {
        "moments": moments,
        "seed": seed,
        "steps": steps,
        "validation_loss": run.validation_loss,
        "bytes_a_parameter": stored / sum(leaf.size for leaf in jax.tree.leaves(run.params)),
        "seconds": round(seconds, 1),
    }


def summarize(runs: list[dict]) -> dict[str, dict]:
    """For each format its bytes, each seed's loss, and how far it lies above float32's."""
    losses = {name: {} for name in FORMATS}
    for run in runs:
        losses[run["moments"]][run["seed"]] = run["validation_loss"]
    stored = {run["moments"]: run["bytes_a_parameter"] for run in runs}
    return {
        name: {
            "bytes_a_parameter": stored[name],
            "losses": losses[name],
            "above_float32": [
                loss - losses["float32"][seed]
                for seed, loss in losses[name].items()
                if seed in losses["float32"]
            ],
        }
        for name in FORMATS
        if losses[name]
    }


def table(summary: dict[str, dict]) -> Table:
    title = "Validation loss, nats a character: mean ± standard deviation"
    shown = Table(title=title, box=box.SIMPLE)
    for column in ("moments", "bytes each", "seeds", "loss", "above float32"):
        shown.add_column(column, justify="left" if column == "moments" else "right")
    for name, row in summary.items():
        shown.add_row(
            name,
            f"{row['bytes_a_parameter']:.2f}",
            str(len(row["losses"])),
            spread([*row["losses"].values()], "{:.4f}"),
            spread(row["above_float32"], "{:+.4f}"),
        )
    return shown


def spread(values: list[float], form: str) -> str:
    """Mean and, of more than one value, standard deviation."""
    if not values:
        return ""
    return form.format(mean(values)) + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def draw(summary: dict[str, dict], path: Path) -> None:
    """Validation loss by format, fewest bytes first: a pale line for each seed, and the mean."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted(summary.items(), key=lambda item: item[1]["bytes_a_parameter"])
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    # A line joins runs that began from the same weights and saw the same batches.
    for seed in sorted({seed for _, row in rows for seed in row["losses"]}):
        values = [row["losses"].get(seed, float("nan")) for _, row in rows]
        axes.plot(values, "o-", color="#8fbbe8", markersize=4, linewidth=1.2, label="one seed")
    means = [mean(row["losses"].values()) for _, row in rows]
    axes.plot(means, "o", color="#b3361e", markersize=8, label="mean")
    names = [f"{name}\n{row['bytes_a_parameter']:.2f}" for name, row in rows]
    axes.set_xticks(range(len(rows)), names)
    axes.margins(x=0.08, y=0.15)
    axes.set(
        title="A character transformer on Python's standard library",
        xlabel="Adam's moments, and their bytes for each parameter",
        ylabel="validation loss, nats a character",
    )
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[-2:], labels[-2:], frameon=False, loc="best")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", nargs="*", choices=FORMATS, default=FORMATS)
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--fresh", action="store_true", help="make the recorded runs again")
    parser.add_argument("--out", type=Path, help="folder of both files (results/ and docs/)")
    args = parser.parse_args(argv)

    path = (args.out or RESULTS) / "lean_quality.json"
    recorded = [] if args.fresh or not path.exists() else json.loads(path.read_text())["runs"]
    runs = {(run["moments"], run["seed"], run["steps"]): run for run in recorded}
    console, train = Console(), runpy.run_path(str(EXAMPLE))["train"]
    columns = [
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[report]}"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console) as bar:
        for seed in args.seeds:  # the outer loop: cut short, it has compared formats fairly
            for moments in args.moments:
                if (key := (moments, seed, args.steps)) not in runs:
                    runs[key] = measure(train, *key, bar)
                    kept = {"machine": machine(), "versions": versions()}
                    save(path, {**kept, "runs": list(runs.values())})
    summary = summarize([run for run in runs.values() if run["steps"] == args.steps])
    console.print(table(summary))
    draw(summary, (args.out or DOCS) / "lean_quality.png")


if __name__ == "__main__":
    main()
