# SPDX-License-Identifier: Apache-2.0
"""What each stage that papers chain around AdamW costs in a step, beside AdamW's, in turn.

    python benchmarks/stage_cost.py              # writes benchmarks/results/stage_cost.json
    python benchmarks/stage_cost.py --tree "ResNet-50" --rounds 5 --out /tmp

GPT-2 small takes some gigabytes. The parameters and the state are donated, as in training.
"""

import argparse
import gc
import time
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import optax
from lean import RESULTS, machine, save, versions
from model_trees import gpt2_small, resnet50

import adamfn

TREES = {"GPT-2 small": gpt2_small, "ResNet-50": resnet50}


def adamw(*before_decay, first=(), decay=None, last=()):
    return adamfn.chain(
        *first,
        adamfn.scale_by_moments(),
        adamfn.bias_correct(),
        *before_decay,
        decay or adamfn.add_decayed_weights(0.1),
        *last,
        adamfn.scale_by_lr(1e-3),
    )


RECIPES = {
    "AdamW through XLA": adamfn.with_backend(adamw(), "xla"),
    "optax.clip_by_global_norm": adamw(first=[optax.clip_by_global_norm(1.0)]),
    "clip_by_global_norm": adamw(first=[adamfn.clip_by_global_norm(1.0)]),
    "skip_outliers, of the norm": adamw(first=[adamfn.skip_outliers(["grad_norm"])]),
    "skip_outliers, of the loss": adamw(first=[adamfn.skip_outliers(["loss"])]),
    "add_decayed_weights, cautious": adamw(decay=adamfn.add_decayed_weights(0.1, cautious=True)),
    "add_corrected_decay": adamw(decay=adamfn.add_corrected_decay(0.1, 1e-3, 1e-3)),
    "clip_updates": adamw(last=[adamfn.clip_updates()]),
    "cautious_updates": adamw(adamfn.cautious_updates()),
    "scale_by_atan2_moments": adamfn.chain(
        adamfn.scale_by_atan2_moments(),
        adamfn.add_decayed_weights(0.1),
        adamfn.scale_by_lr(1e-3),
    ),
}
WEIGHTS = {
    f"round_weights({bits})": adamfn.chain(adamw(), adamfn.round_weights(bits))
    for bits in (16, 24, 32)
}
"""Of bfloat16 weights, whose gradients have that dtype too."""


class Candidate:
    """An optimizer, its arrays, and the seconds that its steps took."""

    def __init__(self, name, tx, grads):
        self.params = jax.tree.map(jnp.ones_like, grads)
        self.state, self.seconds = tx.init(self.params), []
        extra = {"loss": 2.0} if name.endswith("loss") else {}
        step = jax.jit(
            lambda params, state, grads: adamfn.step(tx, grads, state, params, **extra),
            donate_argnums=(0, 1),
        )
        self.step = step.lower(self.params, self.state, grads).compile()
        parameters = sum(leaf.size for leaf in jax.tree.leaves(grads))
        self.temporary = self.step.memory_analysis().temp_size_in_bytes / parameters

    def run(self, grads):
        """One step."""
        began = time.perf_counter()
        moved = self.step(self.params, self.state, grads)
        self.params, self.state = jax.block_until_ready(moved)
        self.seconds.append(time.perf_counter() - began)


def compare(name, tx, grads, rounds):
    """Seconds of a step, and its ratio to AdamW's, which takes turns with it."""
    base, other = Candidate("AdamW", adamw(), grads), Candidate(name, tx, grads)
    for k in range(rounds + 2):
        for candidate in (base, other) if k % 2 else (other, base):
            candidate.run(grads)
    ratios = sorted(b / a for a, b in zip(base.seconds[2:], other.seconds[2:], strict=True))
    return {
        "seconds": min(other.seconds),
        "adamw_seconds": min(base.seconds),
        "ratio": {"median": median(ratios), "min": ratios[0], "max": ratios[-1]},
        "temporary_bytes_a_parameter": round(other.temporary, 3),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", choices=TREES, default="GPT-2 small")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the file")
    args = parser.parse_args(argv)
    shapes = jax.tree.leaves(TREES[args.tree](), is_leaf=lambda node: isinstance(node, tuple))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    grads = [1e-2 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    results = {}
    for name, tx in {**RECIPES, **WEIGHTS}.items():
        dtype = jnp.bfloat16 if name in WEIGHTS else jnp.float32
        own = [g.astype(dtype) for g in grads]
        results[name] = compare(name, tx, own, args.rounds)
        ratio = results[name]["ratio"]
        print(f"{name:32s} {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
        gc.collect()
        kept = {"machine": machine(), "versions": versions(), "tree": args.tree}
        save(args.out / "stage_cost.json", {**kept, "results": results})


if __name__ == "__main__":
    main()
