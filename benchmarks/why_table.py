# SPDX-License-Identifier: Apache-2.0
"""The README's table: each claim, adamfn's figure, the peers' figures, and a link to the evidence.

Figures come from `benchmarks/results/`. Two rows have tests instead, named in comments.
"""

import json
from math import acos, degrees
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).parent / "results"
LAST_DIGIT = 2**-23
"""The last binary digit of a float32, relative to the number."""


def why() -> str:
    """At most eight claims."""
    rows = [
        exact(),
        fast(),
        on_gpu(),
        small(),
        faithful(),
        narrow_weights(),
        taken_over(),
        started(),
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(
        ["| what you gain | adamfn | others | evidence |", "|---|---|---|---|", *lines]
    )


def why_at_home() -> str:
    """The same, with the links of a page in docs/."""
    return why().replace("](docs/", "](")


STARTS = ("GPT-2 small", "1000 leaves")


def exact() -> tuple[str, ...]:
    ours, optax, torch = (
        f"{max(_recorded('exactness')['errors'][name]) / LAST_DIGIT:.1f}"
        for name in ("adamfn.adam", "optax.adam", "torch.optim.Adam")
    )
    return (
        "**Exact updates.** Largest error of an update, in units of float32's last binary digit",
        ours,
        f"optax {optax}, torch {torch}",
        "[exactness](docs/benchmarks.md#exactness)",
    )


def fast() -> tuple[str, ...]:
    rows = _recorded("step_speed")["updates"]["GPT-2 small"]
    step, torch = (
        rows[name]["times_as_fast_as"]["optax"]["median"] for name in ("adamfn step", "torch fused")
    )
    return (
        "**Fast on CPU.** Speed of a step of GPT-2 small, relative to optax (higher is faster)",
        f"{step:.2f}",
        f"optax 1, torch (fused) {torch:.2f}",
        "[speed](docs/benchmarks.md#speed)",
    )


def on_gpu() -> tuple[str, ...]:
    rows = _recorded("gpu_speed")["updates"]["large matrix"]["float32"]
    lean, wide, optax, torch, flashoptim = (
        f"{1e3 * rows[name]['seconds']:.2f} ms"
        for name in ("step 8bit", "step float32", "optax", "torch fused", "flashoptim")
    )
    return (
        "**Fast on GPU.** Time of a step of 268 million parameters on an H100",
        f"{lean} with a state in 8 bits, {wide} in float32",
        f"in float32: optax {optax}, torch (fused) {torch}; in 8 bits: flashoptim {flashoptim}",
        "[accelerators](docs/accelerators.md#timings)",
    )


def small() -> tuple[str, ...]:
    runs = _recorded("lean_quality")["runs"]
    lean, wide = ([r for r in runs if r["moments"] == name] for name in ("8bit", "float32"))
    loss, size = (
        [mean(run[key] for run in own) for own in (lean, wide)]
        for key in ("validation_loss", "bytes_a_parameter")
    )
    return (
        "**A small state.** Bytes of optimizer state per parameter, and the validation loss of a"
        f" small transformer (mean of {len(lean)} seeds; lower is better)",
        f"{size[0]:.2f} bytes, loss {loss[0]:.3f}",
        f"float32: {size[1]:.2f} bytes, loss {loss[1]:.3f}",
        "[training](docs/benchmarks.md#lean-moments)",
    )


def faithful() -> tuple[str, ...]:
    rows = _recorded("lean_fidelity")["rows"]
    ours, bitsandbytes, torchao = (
        f"{degrees(acos(rows[f'{who} 8bit']['spreads']['4']['cosine'])):.0f}°"
        for who in ("adamfn", "bitsandbytes", "torchao")
    )
    return (
        "**A small state that keeps its direction.** Angle between the updates of an 8-bit and of"
        " a float32 state, if the gradients of an array differ in size by up to 10,000 times",
        ours,
        f"bitsandbytes {bitsandbytes}, torchao {torchao}",
        "[lean moments](docs/lean_moments.md#why-they-work)",
    )


def narrow_weights() -> tuple[str, ...]:
    # tests/test_round_weights.py: test_a_weight_moves_as_far_as_it_should, of 24 bits and a rate of
    # 1e-6, and test_optaxs_own_bfloat16_stays_where_it_was.
    return (
        "**Bfloat16 weights that train.** A weight starting at 1.0 after 2,000 steps of 1e-6"
        " (correct: 0.998)",
        "0.998, with one extra byte per weight",
        "optax 1.000",
        "[weights in 16 bits](docs/sixteen_bit_weights.md)",
    )


def taken_over() -> tuple[str, ...]:
    # tests/test_interop_torch.py: test_a_torch_run_goes_on.
    return (
        "**Resumes torch runs.** Largest difference from torch's parameters after 40 steps in torch"
        " and 40 in adamfn",
        "one millionth of the largest parameter",
        "optax cannot read torch's state",
        "[taking over a run](docs/taking_over_runs.md)",
    )


def started() -> tuple[str, ...]:
    trees = _recorded("first_step")["results"]
    ours, theirs = (
        " and ".join(f"{trees[tree]['cold'][who]['total']:.1f} s" for tree in STARTS)
        for who in ("adamfn", "optax")
    )
    return (
        "**Quick to start.** From a new process to the end of its first step:"
        f" {' and '.join(STARTS)}",
        ours,
        f"optax {theirs}",
        "[the first step](docs/benchmarks.md#the-first-step)",
    )


def _recorded(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())
