# SPDX-License-Identifier: Apache-2.0
"""What a newcomer waits for: the import, the state, and the first step, in fresh processes.

AdamW over three trees of float32 parameters, by optax, by adamfn, and by adamfn with moments in 8
bits, taking turns. Each process reports its seconds for `import`, `init`, tracing, lowering,
compiling and running the first jitted step. It runs once with an empty compilation cache, and once
with what that run left there. jax's import, which both need, is part of `import`.

    python benchmarks/first_step.py              # writes benchmarks/results/first_step.json
    python benchmarks/first_step.py --rounds 2 --trees MLP --out /dev/null
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

TREES = {"MLP": "mlp", "GPT-2 small": "gpt2_small", "1000 leaves": "thousand_leaves"}
PEERS = ("optax", "adamfn", "adamfn 8bit")
PARTS = ("import", "init", "trace", "lower", "compile", "run")
RESULTS = Path(__file__).parent / "results"


def first_step(peer: str, tree: str) -> dict[str, float]:
    """The seconds of each part, in this process, which has not imported JAX yet."""
    times = [time.perf_counter()]
    if peer == "optax":
        import optax

        tx = optax.adamw(1e-3)
    else:
        import adamfn

        tx = adamfn.adamw(1e-3, moments="8bit" if "8bit" in peer else "float32")
    times.append(time.perf_counter())

    import jax
    import jax.numpy as jnp
    import model_trees

    def step(params: Any, state: Any, grads: Any) -> Any:
        if peer != "optax":
            return adamfn.step(tx, grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    shapes = model_trees.abstract(getattr(model_trees, TREES[tree])())
    make = jax.jit(lambda: jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes))
    params, grads = jax.block_until_ready((make(), make()))
    began = time.perf_counter()
    state = jax.block_until_ready(tx.init(params))
    times.append(times[-1] + time.perf_counter() - began)  # without what the arrays took
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(params, state, grads)
    times.append(times[1] + time.perf_counter() - began)
    lowered = traced.lower()
    times.append(times[1] + time.perf_counter() - began)
    compiled = lowered.compile()
    times.append(times[1] + time.perf_counter() - began)
    jax.block_until_ready(compiled(params, state, grads))
    times.append(times[1] + time.perf_counter() - began)
    return {part: b - a for part, a, b in zip(PARTS, times, times[1:], strict=False)}


def in_a_process(peer: str, tree: str, cache: str) -> dict[str, float]:
    """`first_step` in a new process that keeps what it compiles in the folder `cache`."""
    keep = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, __file__, "--peer", peer, "--trees", tree]
    done = subprocess.run(command, env=os.environ | keep, check=True, capture_output=True)
    return json.loads(done.stdout)


def summarize(samples: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Median seconds of each part and of all, and the total's ratios to optax's, round by round."""
    totals = {peer: [sum(r.values()) for r in rounds] for peer, rounds in samples.items()}
    summary = {}
    for peer, rounds in samples.items():
        ratios = sorted(a / b for a, b in zip(totals[peer], totals["optax"], strict=True))
        summary[peer] = {
            "seconds": {part: median(r[part] for r in rounds) for part in PARTS},
            "total": median(totals[peer]),
            "times_optax": {"median": median(ratios), "min": ratios[0], "max": ratios[-1]},
        }
    return summary


def measure(tree: str, rounds: int) -> dict[str, Any]:
    """The peers in turn, with a cold and a warm compilation cache."""
    samples = {cache: {peer: [] for peer in PEERS} for cache in ("cold", "warm")}
    for i in range(rounds):
        for peer in PEERS if i % 2 else reversed(PEERS):
            with tempfile.TemporaryDirectory() as folder:
                for cache in ("cold", "warm"):
                    samples[cache][peer].append(in_a_process(peer, tree, folder))
    return {cache: summarize(own) for cache, own in samples.items()}


def show(results: dict[str, Any]) -> None:
    """Prints the results as a table."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="Seconds to the first step (median), each in a new process")
    for column in ("tree", "cache", "library", *PARTS, "total", "times optax's"):
        shown.add_column(column)
    for tree, caches in results.items():
        for cache, peers in caches.items():
            for peer, row in peers.items():
                ratio = row["times_optax"]
                seconds = [f"{row['seconds'][part]:.2f}" for part in PARTS]
                spread = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
                shown.add_row(tree, cache, peer, *seconds, f"{row['total']:.2f}", spread)
    Console(width=140).print(shown)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trees", nargs="*", choices=TREES, default=[*TREES])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer", choices=PEERS, help="measure this one alone, in this process")
    parser.add_argument("--out", type=Path, default=RESULTS / "first_step.json")
    args = parser.parse_args(argv)
    if args.peer:
        print(json.dumps(first_step(args.peer, args.trees[0])))
        return
    results = {tree: measure(tree, args.rounds) for tree in args.trees}
    show(results)
    from lean import machine, save, versions

    recorded = {"machine": machine(), "versions": versions(), "rounds": args.rounds}
    save(args.out, recorded | {"results": results})


if __name__ == "__main__":
    main()
