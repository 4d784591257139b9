# SPDX-License-Identifier: Apache-2.0
"""What a look inside costs: a training step by `adamfn.monitor.step`, and by `adamfn.step`.

The character transformer of examples/char_lm.py, twenty steps in one jitted scan as it trains
there, with a look at every step, at every tenth, and at none, taking turns in one process.

    python benchmarks/monitor_cost.py              # writes benchmarks/results/monitor_cost.json
    python benchmarks/monitor_cost.py --rounds 3 --moments 8bit --out /dev/null
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from lean import BENCHMARKS, RESULTS, chosen, machine, save, versions
from rich.console import Console
from rich.progress import track
from rich.table import Table

import adamfn
from adamfn import monitor

sys.path.append(str(BENCHMARKS.parent / "examples"))
import char_lm

STEPS = 20
LOOKS = {"none": None, "every=10": 10, "every=1": 1}


def training(moments: str, every: int | None) -> tuple[Callable[[], None], float]:
    """Twenty steps in one call, which goes on from where the last ended; seconds of compiling."""
    tx = adamfn.adamw(1e-3, **chosen(moments))

    @partial(jax.jit, donate_argnums=(0, 1))
    def steps(params, state, windows):
        def step(carry, windows):
            params, state = carry
            grads = jax.grad(char_lm.loss_of)(params, windows)
            if every is None:
                return adamfn.step(tx, grads, state, params), None
            *carry, seen = monitor.step(tx, grads, state, params, every=every)
            return tuple(carry), seen

        return jax.lax.scan(step, (params, state), windows)

    text = jnp.asarray(char_lm.load()[0])
    starts = jax.random.randint(jax.random.key(1), (STEPS, char_lm.BATCH, 1), 0, len(text) - 65)
    windows = text[starts + jnp.arange(char_lm.CONTEXT + 1)].astype(jnp.int32)
    params = char_lm.init(jax.random.key(0))
    carry = [params, tx.init(params)]
    began = time.perf_counter()
    compiled = steps.lower(*carry, windows).compile()
    seconds = time.perf_counter() - began

    def run() -> None:
        carry[:], _ = jax.block_until_ready(compiled(*carry, windows))

    return run, seconds


def measure(moments: str, rounds: int) -> dict[str, Any]:
    """Seconds of a step, and by how much longer it is than without a look in the same round.

    By the clock, and by the processors' time, which other programs on the machine hardly change.
    """
    runs = {name: training(moments, every) for name, every in LOOKS.items()}
    for run, _ in runs.values():
        run()  # once before it counts
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in track(range(rounds), description=moments):
        for name in runs if number % 2 else reversed(runs):
            began = time.perf_counter(), time.process_time()
            runs[name][0]()
            ended = time.perf_counter(), time.process_time()
            samples[name].append(tuple((b - a) / STEPS for a, b in zip(began, ended, strict=True)))
    results = {}
    for name, own in samples.items():
        results[name] = {"compile_seconds": runs[name][1]}
        for place, clock in enumerate(("seconds", "processor_seconds")):
            pairs = zip(own, samples["none"], strict=True)
            longer = sorted(mine[place] / none[place] - 1 for mine, none in pairs)
            results[name][clock] = {
                "median": median(sample[place] for sample in own),
                "longer": {"median": median(longer), "min": longer[0], "max": longer[-1]},
            }
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", nargs="*", default=["float32", "8bit"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=RESULTS / "monitor_cost.json")
    args = parser.parse_args(argv)
    results = {moments: measure(moments, args.rounds) for moments in args.moments}
    table = Table("moments", "looks", "ms a step", "longer", "processors' ms", "longer", "compiled")
    for moments, rows in results.items():
        for name, row in rows.items():
            cells = []
            for clock in ("seconds", "processor_seconds"):
                cells.append(f"{1e3 * row[clock]['median']:.1f}")
                cells.append(
                    "{median:+.1%} ({min:+.1%} to {max:+.1%})".format(**row[clock]["longer"])
                )
            table.add_row(moments, name, *cells, f"{row['compile_seconds']:.1f} s")
    Console().print(table)
    save(
        args.out,
        {
            "machine": machine(),
            "versions": versions(),
            "steps_in_a_call": STEPS,
            "rounds": args.rounds,
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
