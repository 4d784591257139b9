# SPDX-License-Identifier: Apache-2.0
"""What the recipes of docs/recipes.md do to training: examples/char_lm.py, three seeds each.

The result of every run is written when it ends, and runs that are there already are not made again.

    python benchmarks/recipes_effect.py          # writes benchmarks/results/recipes_effect.json
    python benchmarks/recipes_effect.py --recipes AdamW C-AdamW --seeds 0 --steps 100 --out /tmp
"""

import argparse
import json
import runpy
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from lean import BENCHMARKS, RESULTS, machine, save, versions
from optax.contrib import (
    MuonDimensionNumbers,
    scale_by_muon,
    schedule_free,
    schedule_free_eval_params,
)

import adamfn

SEEDS, STEPS = (0, 1, 2), 100
EXAMPLE = BENCHMARKS.parent / "examples" / "char_lm.py"
PEAK, DECAY, B1, B2, EPS = 3e-3, 0.1, 0.9, 0.99, 1e-8
MATRICES = adamfn.masks.matrices()


def adamw(schedule, *before_decay, first=(), decay=None, last=()):
    """AdamW with stages of a recipe in their places."""
    return adamfn.chain(
        *first,
        adamfn.scale_by_moments(B1, B2, EPS),
        adamfn.bias_correct(B1, B2),
        *before_decay,
        decay or adamfn.add_decayed_weights(DECAY, MATRICES),
        *last,
        adamfn.scale_by_lr(schedule),
    )


def atan2(schedule):
    return adamfn.chain(
        adamfn.scale_by_atan2_moments(B1, B2),
        adamfn.add_decayed_weights(DECAY, MATRICES),
        adamfn.scale_by_lr(schedule),
    )


def on_spheres(schedule):
    def keep_norm(u, p):
        return (p + u) * (jnp.linalg.norm(p) / jnp.linalg.norm(p + u)) - p

    sphere = optax.masked(optax.stateless_with_tree_map(keep_norm), MATRICES)
    return adamfn.chain(adamfn.adam(schedule, B1, B2), sphere)


def muon(schedule):
    def labels(params):
        mask = adamfn.masks.matrices(but=["characters", "norm"])(params)
        return jax.tree.map(lambda yes: "muon" if yes else "adam", mask)

    def dimensions(params):
        return jax.tree.map(lambda _: MuonDimensionNumbers(0, 1), params)

    matrices = optax.chain(
        scale_by_muon(weight_dimension_numbers=dimensions),
        optax.add_decayed_weights(DECAY),
        optax.scale_by_learning_rate(lambda count: 10 * schedule(count)),
    )
    return optax.partition({"muon": matrices, "adam": adamw(schedule)}, labels)


def constant(schedule):
    """The schedule's warmup, and then its peak."""
    return lambda count: jnp.where(schedule(count + 1) > schedule(count), schedule(count), PEAK)


def warm_stable_decay(steps):
    warm, stable = steps // 10, steps * 7 // 10
    parts = [
        optax.linear_schedule(PEAK / 10, PEAK, warm),
        optax.constant_schedule(PEAK),
        optax.linear_schedule(PEAK, PEAK / 10, steps - warm - stable),
    ]
    return optax.join_schedules(parts, [warm, warm + stable])


def recipes(steps):
    """By name, what makes an optimizer of the example's schedule."""
    return {
        "AdamW": adamw,
        "clipping by the global norm": lambda s: adamw(s, first=[adamfn.clip_by_global_norm(1.0)]),
        "StableAdamW": lambda s: adamw(s, last=[adamfn.clip_updates(B2, EPS)]),
        "C-AdamW": lambda s: adamw(s, adamfn.cautious_updates()),
        "cautious decay": lambda s: adamw(
            s, decay=adamfn.add_decayed_weights(DECAY, MATRICES, cautious=True)
        ),
        "AdamC": lambda s: adamw(s, decay=adamfn.add_corrected_decay(DECAY, s, PEAK, MATRICES)),
        "Adam-atan2": atan2,
        "matrices on spheres": on_spheres,
        "schedule-free": lambda s: schedule_free(
            adamfn.adamw(constant(s), 0.0, B2, weight_decay=DECAY, mask=MATRICES),
            constant(s),
            b1=B1,
        ),
        "Muon for matrices": muon,
        "WSD": lambda s: adamw(warm_stable_decay(steps)),
    }


def main(argv: list[str] | None = None) -> None:
    names = list(recipes(STEPS))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="*", choices=names, default=names)
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--fresh", action="store_true", help="make the recorded runs again")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the file")
    args = parser.parse_args(argv)

    path = args.out / "recipes_effect.json"
    recorded = [] if args.fresh or not path.exists() else json.loads(path.read_text())["runs"]
    runs = {(run["recipe"], run["seed"], run["steps"]): run for run in recorded}
    example = runpy.run_path(str(EXAMPLE))
    for seed in args.seeds:  # the outer loop: cut short, it has compared recipes fairly
        for name in args.recipes:
            key = name, seed, args.steps
            if key in runs:
                continue
            began = time.perf_counter()
            run = example["train"](
                steps=args.steps,
                seed=seed,
                recipe=recipes(args.steps)[name],
                evaluated=schedule_free_eval_params if name == "schedule-free" else None,
            )
            runs[key] = {
                "recipe": name,
                "seed": seed,
                "steps": args.steps,
                "validation_loss": run.validation_loss,
                "seconds": round(time.perf_counter() - began, 1),
            }
            save(path, {"machine": machine(), "versions": versions(), "runs": [*runs.values()]})
            print(f"{name:28s} seed {seed}: {run.validation_loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
