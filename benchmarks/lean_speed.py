# SPDX-License-Identifier: Apache-2.0
"""What an update costs at run time, by how Adam's moments are stored: GPT-2 small's tree.

One update with the parameters applied, 124M float32 parameters, adamfn with each format and
optax.adam taking turns in one process with torch's fused AdamW, torchao and bitsandbytes, where
they are installed. Medians, and ratios to adamfn's float32, round by round. Takes about 8 GB.

    python benchmarks/lean_speed.py              # writes benchmarks/results/lean_speed.json
    python benchmarks/lean_speed.py --moments float32 8bit --no-peers --rounds 3 --out /dev/null
"""

import argparse
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import model_trees
import numpy as np
import optax
from lean import FORMATS, RESULTS, chosen, machine, quieten, save, versions
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import adamfn

BASE = "adamfn float32"
TORCH = {
    "torch fused": ("torch.optim", "AdamW", {"fused": True}),
    "torchao 8bit": ("torchao.optim", "AdamW8bit", {}),
    "bitsandbytes 8bit": ("bitsandbytes.optim", "AdamW8bit", {}),
}
Update = Callable[[], None]


def by_jax(transformations: dict) -> dict[str, Update]:
    """One update of each, on parameters that they hand on to one another: each keeps a state."""
    shapes = model_trees.abstract(model_trees.gpt2_small())
    random = np.random.default_rng(0)
    grads = jax.tree.map(
        lambda leaf: jnp.asarray(1e-3 * random.standard_normal(leaf.shape, np.float32)), shapes
    )
    params = jax.tree.map(jnp.zeros_like, grads)

    def update_of(tx) -> Update:
        # What is donated comes back in the same order: JAX pairs buffers of one shape by order, and
        # XLA copies what is paired with another's result.
        def train_step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return adamfn.apply_updates(params, updates), state

        step, state = jax.jit(train_step, donate_argnums=(0, 1)), jax.jit(tx.init)(params)

        def update() -> None:
            nonlocal params, state
            params, state = jax.block_until_ready(step(params, state, grads))

        return update

    return {name: update_of(tx) for name, tx in transformations.items()}


def by_torch() -> dict[str, Update]:
    """The same for torch's optimizers, on one list of parameters."""
    peers = {name: peer for name, peer in TORCH.items() if find_spec(peer[0].partition(".")[0])}
    if not peers:
        return {}
    import torch

    shapes = jax.tree.leaves(model_trees.abstract(model_trees.gpt2_small()))
    params = [torch.zeros(leaf.shape, requires_grad=True) for leaf in shapes]
    for param in params:
        param.grad = 1e-3 * torch.randn(param.shape)
    return {
        name: getattr(import_module(module), peer)(
            params, lr=1e-3, weight_decay=0.0, **options
        ).step
        for name, (module, peer, options) in peers.items()
    }


def measure(updates: dict[str, Update], rounds: int, console: Console) -> dict[str, list[float]]:
    """Seconds of every update in every round; each has compiled and run twice before."""
    for update in track([*updates.values()], description="compile", console=console):
        update()
        update()
    samples = {name: [] for name in updates}
    for i in track(range(rounds), description="measure", console=console):
        for name in updates if i % 2 else reversed(updates):
            updates[name]()  # its memory may have been reclaimed while the others had their turns
            began = time.perf_counter()
            updates[name]()
            samples[name].append(time.perf_counter() - began)
    return samples


def summarize(samples: dict[str, list[float]]) -> dict[str, dict]:
    """Median seconds, and the ratio to float32's of the same round: median, least and largest."""
    results = {}
    for name, seconds in samples.items():
        ratios = sorted(a / b for a, b in zip(seconds, samples[BASE], strict=True))
        results[name] = {
            "seconds": median(seconds),
            "ratio_to_float32": {"median": median(ratios), "min": ratios[0], "max": ratios[-1]},
        }
    return results


def table(results: dict[str, dict]) -> Table:
    shown = Table(title="One update of GPT-2 small's 124M parameters", box=box.SIMPLE)
    for column in ("Adam by", "ms (median)", "times adamfn's float32"):
        shown.add_column(column, justify="left" if column == "Adam by" else "right")
    for name, result in results.items():
        ratio = result["ratio_to_float32"]
        shown.add_row(
            name,
            f"{1e3 * result['seconds']:.0f}",
            f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
        )
    return shown


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", nargs="*", choices=FORMATS, default=FORMATS)
    parser.add_argument("--no-peers", action="store_true", help="adamfn and optax alone")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=RESULTS / "lean_speed.json")
    args = parser.parse_args(argv)

    names = ("float32", *(name for name in args.moments if name != "float32"))
    transformations = {f"adamfn {name}": adamfn.adam(1e-3, **chosen(name)) for name in names}
    updates = by_jax({**transformations, "optax": optax.adam(1e-3)})
    if not args.no_peers:
        quieten()
        updates |= by_torch()
    console = Console()
    results = summarize(measure(updates, args.rounds, console))
    console.print(table(results))
    recorded = {"machine": machine(), "versions": versions(), "rounds": args.rounds}
    save(args.out, {**recorded, "results": results})


if __name__ == "__main__":
    main()
