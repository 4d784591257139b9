# SPDX-License-Identifier: Apache-2.0
"""How fast an update is on the GPU at hand: every format beside its peers and a plain copy.

Adam by adamfn in every format, by `step` and by `update` with the parameters applied, optax's and
flashoptim-jax's jitted, ten updates in a call, and torch's optimizers that are installed, all of
them taking turns in one process. Beside the time of an update stands the bandwidth that it reached,
as a share of a copy's: the bytes that it cannot do without (parameters and state read and written
once, gradients read once), over its time.

Takes a GPU with 40 GB that does nothing else.

Results of trees that are not measured this time stay as they are.

    python benchmarks/gpu_speed.py              # writes benchmarks/results/gpu_speed.json
    python benchmarks/gpu_speed.py --trees "GPT-2 small" --dtypes float32 --rounds 3 --out /dev/null
"""

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too

import gpu_candidates
import jax
import jax.numpy as jnp
import model_trees
from ahead_of_time import trees
from ahead_of_time.candidates import OPTAX, candidates
from gpu_candidates import IN_A_CALL, Timed
from lean import RESULTS, machine, quieten, save, versions
from rich import box
from rich.console import Console
from rich.table import Table
from step_speed import repeats, seconds, spread

TREES = {"GPT-2 small": model_trees.gpt2_small(), **trees.TREES}
DTYPES = ("float32", "bfloat16")
COPIED = 2**30
"""Bytes: many times what a GPU's cache holds."""


def copy_bandwidth(rounds: int) -> float:
    """Bytes a second of a plain copy, those read and those written: the fastest of some."""
    x = jnp.ones(COPIED // 4)
    copy = jax.jit(jnp.copy)

    def run(times: int) -> None:
        for _ in range(times):
            done = copy(x)
        done.block_until_ready()

    times = repeats(run)
    return 2 * COPIED * times / min(seconds(run, times) for _ in range(rounds))


def measure(timed: dict[str, Timed], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of an update of each, how many times as fast as optax, and what it must move."""
    times = {name: repeats(own.run) for name, own in timed.items()}
    samples = {name: [] for name in timed}
    for i in range(rounds):
        for name in timed if i % 2 else reversed(timed):
            samples[name].append(seconds(timed[name].run, times[name]) / times[name] / IN_A_CALL)
    return {
        name: {
            "seconds": median(own),
            "times_as_fast_as_optax": spread(samples[OPTAX], own),
            "least": timed[name].least,
        }
        for name, own in samples.items()
    }


def measure_tree(shapes: Any, dtype: str, rounds: int) -> dict[str, dict]:
    gc.collect()  # what an earlier tree may have left
    timed = gpu_candidates.by_jax(candidates(dtype, "cuda"), shapes, dtype)
    return measure(timed | gpu_candidates.by_torch(shapes, dtype), rounds)


def earlier(path: Path, card: str) -> dict[str, Any]:
    """What was recorded of this card, which trees measured now are added to."""
    recorded = json.loads(path.read_text()) if path.is_file() else {}
    return recorded if recorded.get("card") == card else {"updates": {}, "copy_bytes_a_second": 0}


def table(title: str, rows: dict[str, dict], bandwidth: float) -> Table:
    shown = Table(title=title, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("Adam by", "ms (median)", "times as fast as optax", "of a copy's bandwidth"):
        shown.add_column(column, justify="left" if column == "Adam by" else "right", no_wrap=True)
    for name, row in rows.items():
        ratio = row["times_as_fast_as_optax"]
        shown.add_row(
            name,
            f"{1e3 * row['seconds']:.3f}",
            f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
            f"{row['least'] / row['seconds'] / bandwidth:.2f}",
        )
    return shown


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trees", nargs="*", choices=TREES, default=[*TREES])
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=DTYPES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_speed.json")
    args = parser.parse_args(argv)

    if jax.default_backend() != "gpu":
        sys.exit(f"JAX found no GPU here, only {jax.default_backend()}; this measures a GPU.")
    quieten()
    console = Console(width=100)
    card = jax.devices()[0].device_kind
    recorded = earlier(args.out, card)
    bandwidth = max(copy_bandwidth(args.rounds), recorded["copy_bytes_a_second"])
    console.print(f"{card}: a copy moves {bandwidth / 1e12:.2f} TB/s")
    recorded = {
        "card": card,
        "machine": machine(),
        "versions": versions(),
        "rounds": args.rounds,
        "copy_bytes_a_second": bandwidth,
        "updates": recorded["updates"],
    }
    for name in args.trees:
        for dtype in args.dtypes:
            rows = measure_tree(TREES[name], dtype, args.rounds)
            recorded["updates"].setdefault(name, {})[dtype] = rows
            console.print(table(f"{name}, {dtype}", rows, bandwidth))
            save(args.out, recorded)


if __name__ == "__main__":
    main()
