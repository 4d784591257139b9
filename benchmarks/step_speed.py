# SPDX-License-Identifier: Apache-2.0
"""How fast an update is: adamfn's update and step beside optax and torch, and the limits.

One float32 Adam update with the parameters applied, all of them taking turns in one process, over
five trees of parameters and over one leaf of growing size; the same within the training step of a
small network; and what it costs before the first step. Beside them, the limits: the seven streams
of memory that a step reads and writes, in C++, and a compiled call that does nothing.

Takes 16 GB, and a machine that does nothing else: torch's threads wait busily for one another.

    python benchmarks/step_speed.py              # writes benchmarks/results/step_speed.json
    python benchmarks/step_speed.py --trees MLP --exponents 10 20 --rounds 3 --out /dev/null
"""

import argparse
import gc
import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import model_trees
import step_candidates as candidates
from lean import RESULTS, machine, quieten, save, versions
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from step_candidates import CANDIDATES, OPTAX, STEP, STREAMS, TORCH, UPDATE, Run
from step_cost import cost

import adamfn

TREES = {
    "GPT-2 small": model_trees.gpt2_small,
    "ResNet-50": model_trees.resnet50,
    "one leaf of 2^25": model_trees.one_leaf,
    "1000 leaves of 1000": model_trees.thousand_leaves,
    "MLP": model_trees.mlp,
}
MANY_SMALL = ("1000 leaves of 1000", "MLP")
"""The trees over which passing arrays in and out may cost more than the step."""

TRAINING = "MLP, training step"
BASES = (OPTAX, TORCH, STEP, STREAMS)
LEAST = 0.05
"""Seconds of a sample, at least: a small update is taken so often."""


def updates(shapes: dict, names: Sequence[str], peers: bool, empty: bool = False) -> dict[str, Run]:
    """Each with arrays of its own for everything but the gradients, which JAX's share."""
    gc.collect()  # what an earlier tree may have left
    grads = candidates.gradients(shapes)
    runs = {name: candidates.by_jax(CANDIDATES[name], grads) for name in names}
    if peers:
        runs[TORCH] = candidates.by_torch(grads)
    if empty:
        runs[candidates.EMPTY] = candidates.empty_call(grads)
    if candidates.COMPILER:
        runs[STREAMS] = candidates.seven_streams(sum(x.size for x in jax.tree.leaves(grads)))
    return runs


def measure(runs: dict[str, Run], rounds: int) -> dict[str, dict[str, Any]]:
    """Median seconds of an update of each, and how many times as fast it is as each base."""
    times = {name: repeats(run) for name, run in runs.items()}
    samples = {name: [] for name in runs}
    for i in range(rounds):
        for name in runs if i % 2 else reversed(runs):
            runs[name](1)  # into its caches, and until no thread of another waits busily
            samples[name].append(seconds(runs[name], times[name]) / times[name])
    bases = {base: samples[base] for base in BASES if base in samples}
    return {
        name: {
            "seconds": median(own),
            "times_as_fast_as": {base: spread(theirs, own) for base, theirs in bases.items()},
        }
        for name, own in samples.items()
    }


def repeats(run: Run) -> int:
    """How many updates make a sample."""
    run(1)
    times = 1
    while seconds(run, times) < LEAST:
        times *= 2
    return times


def seconds(run: Run, times: int) -> float:
    began = time.perf_counter()
    run(times)
    return time.perf_counter() - began


def spread(of: list[float], to: list[float]) -> dict[str, float]:
    """The ratios of two lists, round by round."""
    ratios = sorted(a / b for a, b in zip(of, to, strict=True))
    return {"median": median(ratios), "min": ratios[0], "max": ratios[-1]}


def size(shapes: dict) -> dict[str, int]:
    leaves = jax.tree.leaves(model_trees.abstract(shapes))
    return {"leaves": len(leaves), "parameters": sum(math.prod(x.shape) for x in leaves)}


def table(results: dict[str, dict]) -> Table:
    """How many times as fast as optax."""
    title = "Times as fast as optax (median, least to most)"
    shown = Table(title=title, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("tree", "Adam by", "ms (median)", "times as fast"):
        justify = "left" if column in ("tree", "Adam by") else "right"
        shown.add_column(column, justify=justify, no_wrap=True)
    for tree, rows in results.items():
        shown.add_section()
        for name, row in rows.items():
            ratio = row["times_as_fast_as"][OPTAX]
            shown.add_row(
                tree if name == OPTAX else "",
                name,
                f"{1e3 * row['seconds']:.3f}",
                f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
            )
    return shown


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trees", nargs="*", choices=TREES, default=[*TREES])
    parser.add_argument(
        "--exponents",
        nargs="*",
        type=int,
        default=range(10, 27, 2),
        help="of two, for one leaf of growing size",
    )
    parser.add_argument("--no-peers", action="store_true", help="adamfn and optax alone")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cost-rounds", type=int, default=3, help="of tracing and compiling")
    parser.add_argument("--out", type=Path, default=RESULTS / "step_speed.json")
    args = parser.parse_args(argv)

    console = Console()
    peers = candidates.has_torch() and not args.no_peers
    if peers:
        quieten()
    recorded = {
        "machine": machine(),
        "versions": versions(),
        "runs": adamfn.backend("cpu").name,
        "rounds": args.rounds,
    }

    trees = {name: TREES[name]() for name in args.trees}
    results = {}
    for name in track(trees, description="updates", console=console):
        runs = updates(trees[name], [*CANDIDATES], peers, name in MANY_SMALL)
        results[name] = measure(runs, args.rounds)
        del runs  # before the next tree's arrays are made
    if "MLP" in trees:
        runs = {name: candidates.training(each, trees["MLP"]) for name, each in CANDIDATES.items()}
        results[TRAINING] = measure(runs, args.rounds)
    console.print(table(results))

    sizes = {}
    for k in track(args.exponents, description="sizes", console=console):
        runs = updates(model_trees.one_leaf(2**k), (OPTAX, UPDATE, STEP), peers)
        sizes[2**k] = measure(runs, args.rounds)
        del runs
    costs = {}
    for name in track(trees, description="tracing and compiling", console=console):
        costs[name] = cost(trees[name], args.cost_rounds)
    recorded |= {
        "trees": {name: size(shapes) for name, shapes in trees.items()},
        "updates": results,
        "sizes": sizes,
        "cost": costs,
    }
    save(args.out, recorded)


if __name__ == "__main__":
    main()
