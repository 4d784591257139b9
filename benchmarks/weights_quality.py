# SPDX-License-Identifier: Apache-2.0
"""What bfloat16 weights do to training: examples/char_lm.py with its weights kept in four ways.

800 steps on each of three seeds. Gradients have their weights' dtype, and the forward pass computes
in float32: nothing differs but what is stored. The result of every run is written when it ends, and
runs that are there already are not made again; after a change to adamfn, `--fresh` starts over.

    python benchmarks/weights_quality.py         # writes benchmarks/results/weights_quality.json
                                                 # and docs/weights_quality.png
    python benchmarks/weights_quality.py --seeds 0 --steps 100 --out /tmp
"""

import argparse
import json
import runpy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import optax
from lean import BENCHMARKS, DOCS, RESULTS, machine, save, versions
from rich.console import Console
from rich.progress import track

import adamfn

SEEDS, STEPS, WEIGHT_DECAY = (0, 1, 2), 800, 1e-2
EXAMPLE = runpy.run_path(str(BENCHMARKS.parent / "examples" / "char_lm.py"))


class Way(NamedTuple):
    """How weights are kept, and what moves them."""

    dtype: Any
    recipe: Callable[[optax.Schedule], Any]


def rounded(bits: int) -> Callable[[optax.Schedule], Any]:
    return lambda schedule: adamfn.chain(
        adamfn.adamw(schedule, weight_decay=WEIGHT_DECAY, moments="8bit"),
        adamfn.round_weights(bits),
    )


WAYS = {
    "float32": Way(jnp.float32, lambda s: adamfn.adamw(s, weight_decay=WEIGHT_DECAY)),
    "24 bits": Way(jnp.bfloat16, rounded(24)),
    "16 bits": Way(jnp.bfloat16, rounded(16)),
    "optax's bfloat16": Way(jnp.bfloat16, lambda s: optax.adamw(s, weight_decay=WEIGHT_DECAY)),
}


def bytes_a_parameter(way: Way) -> dict[str, float]:
    """What is held for a parameter, by what it is for: of the arrays that a run has."""
    params, state, grads = jax.eval_shape(lambda: arrays(way))
    corrections = optax.tree.get(state, "correction", ())
    held = {
        "weights": stored(params),
        "corrections": stored(corrections),
        "moments": stored(state) - stored(corrections),
        "gradients": stored(grads),
    }
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {name: size / count for name, size in held.items()}


def arrays(way: Way) -> tuple[Any, Any, Any]:
    params = jax.tree.map(lambda w: w.astype(way.dtype), EXAMPLE["init"](jax.random.key(0)))
    grads = jax.grad(EXAMPLE["loss_of"])(params, jnp.zeros((1, 2), jnp.int32))
    return params, way.recipe(lambda count: 1e-3).init(params), grads


def stored(tree: Any) -> int:
    """Bytes of its arrays, without counts and rates, which are scalars."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if leaf.ndim)


def measure(name: str, seed: int, steps: int) -> dict:
    """Makes one run, and validates the float32 weights that it stands for."""
    way, began = WAYS[name], time.perf_counter()
    run = EXAMPLE["train"](
        steps=steps,
        seed=seed,
        recipe=way.recipe,
        evaluated=lambda state, params: adamfn.whole_weights(params, state),
        dtype=way.dtype,
    )
    return {
        "weights": name,
        "seed": seed,
        "steps": steps,
        "validation_loss": run.validation_loss,
        "seconds": round(time.perf_counter() - began, 1),
    }


def losses_of(runs: list[dict]) -> dict[str, dict[int, float]]:
    """The validation loss of each seed, by how weights are kept."""
    losses = {name: {} for name in WAYS}
    for run in runs:
        losses[run["weights"]][run["seed"]] = run["validation_loss"]
    return {name: own for name, own in losses.items() if own}


def percents(losses: dict[str, dict[int, float]], name: str) -> list[float]:
    """How far each seed's loss lies above that of float32, in percent of it."""
    base = losses.get("float32", {})
    return [100 * (loss / base[seed] - 1) for seed, loss in losses[name].items() if seed in base]


def draw(recorded: dict, steps: int, path: Path) -> None:
    """The bytes of a parameter by what they are for, and beside them what they cost in loss."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    losses = losses_of([run for run in recorded["runs"] if run["steps"] == steps])
    names = list(losses)[::-1]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(8.4, 2.8), layout="constrained", sharey=True
    )
    begin = [0.0] * len(names)
    colors = ("#1f6fb4", "#b3361e", "#8fbbe8", "#c9c9c9")
    for use, color in zip(recorded["bytes_a_parameter"]["float32"], colors, strict=True):
        widths = [recorded["bytes_a_parameter"][name][use] for name in names]
        left.barh(names, widths, left=begin, color=color, label=use, height=0.6)
        begin = [a + b for a, b in zip(begin, widths, strict=True)]
    left.bar_label(left.containers[-1], labels=[f"{x:.2f}" for x in begin], padding=3)
    left.set(xlabel="bytes a parameter", xlim=(0, 1.15 * max(begin)))
    left.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(-0.1, 1.0))
    for row, name in enumerate(names):
        above = percents(losses, name)
        right.plot(above, [row] * len(above), "o", color="#8fbbe8", markersize=5)
        right.plot(mean(above), row, "D", color="#b3361e", markersize=7)
    right.axvline(0, color="#444444", linewidth=1, zorder=0)
    right.set(xlabel="loss above float32's, %: seeds, mean")
    right.grid(axis="x", alpha=0.25)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--fresh", action="store_true", help="make the recorded runs again")
    parser.add_argument("--out", type=Path, help="folder of both files (results/ and docs/)")
    args = parser.parse_args(argv)

    path = (args.out or RESULTS) / "weights_quality.json"
    found = [] if args.fresh or not path.exists() else json.loads(path.read_text())["runs"]
    runs = {(run["weights"], run["seed"], run["steps"]): run for run in found}
    console = Console()
    wanted = [(name, seed, args.steps) for seed in args.seeds for name in WAYS]
    recorded = {
        "machine": machine(),
        "versions": versions(),
        "bytes_a_parameter": {name: bytes_a_parameter(way) for name, way in WAYS.items()},
        "runs": list(runs.values()),
    }
    for key in track([key for key in wanted if key not in runs], console=console):
        runs[key] = measure(*key)
        console.print("{} seed {} {} steps: {:.4f}".format(*key, runs[key]["validation_loss"]))
        recorded["runs"] = list(runs.values())
        save(path, recorded)
    draw(recorded, args.steps, (args.out or DOCS) / "weights_quality.png")


if __name__ == "__main__":
    main()
