# SPDX-License-Identifier: Apache-2.0
"""What a training update costs before it first runs: tracing, lowering and compiling.

Adam's update with the parameters applied, over a thousand small leaves and over GPT-2 small's
tree, adamfn and optax taking turns. No array is made: shapes are enough.

    python benchmarks/trace_cost.py              # writes benchmarks/results/trace_cost.json
    python benchmarks/trace_cost.py --rounds 3 --out /dev/null
"""

import argparse
import gc
import json
import os
import platform
import time
from pathlib import Path
from statistics import median

import jax
import model_trees
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import adamfn

PEERS = {
    "optax": (optax.adam(1e-3), optax.apply_updates),
    "adamfn": (adamfn.adam(1e-3), adamfn.apply_updates),
}
TREES = {"1000 leaves": model_trees.thousand_leaves, "GPT-2 small": model_trees.gpt2_small}
STAGES = ("trace", "lower", "compile")


def measure(peer: str, params: dict, compiles: bool) -> dict[str, float]:
    """Seconds for each stage, from cold caches."""
    tx, apply_updates = PEERS[peer]
    state = jax.eval_shape(tx.init, params)

    def train_step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates), state

    jax.clear_caches()
    gc.collect()
    times = [time.perf_counter()]
    traced = jax.jit(train_step, donate_argnums=(1, 2)).trace(params, state, params)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    if compiles:
        lowered.compile()
        times.append(time.perf_counter())
    return {s: b - a for s, a, b in zip(STAGES, times, times[1:], strict=False)}


def summarize(samples: dict[str, list[dict[str, float]]]) -> dict:
    """Median seconds of each stage, and the ratios of optax's time to adamfn's, round by round."""
    stages = {
        peer: {s: median(r[s] for r in rounds if s in r) for s in STAGES}
        for peer, rounds in samples.items()
    }
    ratios = sorted(
        (a["trace"] + a["lower"]) / (b["trace"] + b["lower"])
        for a, b in zip(samples["optax"], samples["adamfn"], strict=True)
    )
    return {
        "seconds": stages,
        "trace_and_lower_ratio": {"median": median(ratios), "min": ratios[0], "max": ratios[-1]},
        "compile_ratio": stages["optax"]["compile"] / stages["adamfn"]["compile"],
        "rounds": len(ratios),
    }


def table(results: dict) -> Table:
    """The results as a table."""
    shown = Table(title="Seconds before the first step (median), cold caches")
    for column in ("tree", "library", *STAGES, "trace + lower", "times cheaper"):
        shown.add_column(column, justify="left" if column in ("tree", "library") else "right")
    for tree, result in results.items():
        ratio = result["trace_and_lower_ratio"]
        for peer, seconds in result["seconds"].items():
            total = seconds["trace"] + seconds["lower"]
            spread = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
            shown.add_row(
                tree,
                peer,
                *(f"{seconds[s]:.3f}" for s in STAGES),
                f"{total:.3f}",
                spread if peer == "adamfn" else "1",
            )
    return shown


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="rounds of trace and lowering")
    parser.add_argument("--compiles", type=int, default=3, help="rounds that also compile")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "trace_cost.json"
    )
    args = parser.parse_args(argv)

    console, results = Console(), {}
    for tree, shapes in TREES.items():
        params = model_trees.abstract(shapes())
        samples = {peer: [] for peer in PEERS}
        for i in track(range(args.rounds), description=tree, console=console):
            for peer in PEERS if i % 2 else reversed(PEERS):
                samples[peer].append(measure(peer, params, i < max(args.compiles, 1)))
        results[tree] = summarize(samples)

    machine = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "adamfn": adamfn.__version__,
        "backend": jax.default_backend(),
    }
    console.print(table(results))
    args.out.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
