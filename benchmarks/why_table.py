"""The README's table: each claim, adamfn's figure, the peers' figures, and a link to the evidence.

Figures come from `benchmarks/results/`. Two rows have tests instead, named in comments.
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).parent / "results"


def why() -> str:
    """At most eight claims."""
    rows = [
        exact(),
        fast(),
        traced(),
        faithful(),
        trained(),
        on_accelerators(),
        narrow_weights(),
        taken_over(),
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(["| | adamfn | others | evidence |", "|---|---|---|---|", *lines])


def exact() -> tuple[str, ...]:
    errors = {name: max(found) for name, found in _recorded("exactness")["errors"].items()}
    return (
        "**Exact**: largest update error, for gradients over nine decades",
        f"{errors['adamfn.adam']:.1e}",
        f"optax {errors['optax.adam']:.1e}, torch {errors['torch.optim.Adam']:.1e}",
        "[exactness](docs/benchmarks.md#exactness)",
    )


def fast() -> tuple[str, ...]:
    rows = _recorded("step_speed")["updates"]["GPT-2 small"]
    step, torch = (
        rows[name]["times_as_fast_as"]["optax"]["median"] for name in ("adamfn step", "torch fused")
    )
    return (
        "**Fast**: speed of one step of GPT-2 small on CPU, relative to optax",
        f"{step:.2f}",
        f"optax 1, torch's fused kernel {torch:.2f}",
        "[speed](docs/benchmarks.md#speed)",
    )


def traced() -> tuple[str, ...]:
    seconds = _recorded("trace_cost")["results"]["1000 leaves"]["seconds"]
    ours, theirs = (seconds[who]["trace"] + seconds[who]["lower"] for who in ("adamfn", "optax"))
    return (
        "**Quick to start**: time to trace and lower an update of 1000 leaves",
        f"{ours:.2f} s",
        f"optax {theirs:.2f} s",
        "[tracing](docs/benchmarks.md#tracing-and-compiling)",
    )


def faithful() -> tuple[str, ...]:
    rows = _recorded("lean_fidelity")["rows"]
    ours, bitsandbytes, torchao = (
        f"{rows[f'{who} 8bit']['spreads']['4']['cosine']:.3f}"
        for who in ("adamfn", "bitsandbytes", "torchao")
    )
    return (
        "**Lean**: cosine between an update with 8-bit moments and the float32 update, when"
        " gradient scales span four decades",
        ours,
        f"bitsandbytes {bitsandbytes}, torchao {torchao}",
        "[lean moments](docs/lean_moments.md#why-they-work)",
    )


def trained() -> tuple[str, ...]:
    runs = _recorded("lean_quality")["runs"]
    lean, wide = ([r for r in runs if r["moments"] == name] for name in ("8bit", "float32"))
    loss, bytes_each = (
        [mean(run[key] for run in own) for own in (lean, wide)]
        for key in ("validation_loss", "bytes_a_parameter")
    )
    return (
        "**Trains as well**: validation loss of a character transformer, mean of"
        f" {len(lean)} seeds",
        f"{loss[0]:.3f} in 8 bits, {bytes_each[0]:.2f} bytes per parameter",
        f"{loss[1]:.3f} in float32, {bytes_each[1]:.2f} bytes",
        "[lean moments](docs/benchmarks.md#lean-moments)",
    )


def on_accelerators() -> tuple[str, ...]:
    moved = _recorded("accelerators")["updates"]["v5e"]["large matrix"]["float32"]
    rows = _recorded("gpu_speed")["updates"]["large matrix"]["float32"]
    ours, optax, flashoptim, fused = (
        f"{1e3 * rows[name]['seconds']:.2f} ms"
        for name in ("step 8bit", "optax", "flashoptim", "torch fused")
    )
    return (
        "**On GPU and TPU too**: an 8-bit step of 268M float32 parameters: time on H100, and bytes"
        " moved per parameter on TPU v5e",
        f"{ours} and {moved['step 8bit']['moved']:.1f} bytes",
        f"float32: optax {optax} and {moved['optax']['moved']:.1f} bytes, torch's fused kernel"
        f" {fused}; 8 bits: flashoptim {flashoptim}",
        "[accelerators](docs/accelerators.md#timings)",
    )


def narrow_weights() -> tuple[str, ...]:
    # tests/test_round_weights.py: test_a_weight_moves_as_far_as_it_should, of 24 bits and a rate of
    # 1e-6, and test_optaxs_own_bfloat16_stays_where_it_was.
    return (
        "**16-bit weights that train**: a weight of 1 after 2000 steps of 1e-6; 0.998 is correct",
        "0.998, with one extra byte per weight",
        "optax 1.000",
        "[weights in 16 bits](docs/sixteen_bit_weights.md)",
    )


def taken_over() -> tuple[str, ...]:
    # tests/test_interop_torch.py: test_a_torch_run_goes_on.
    return (
        "**Portable**: distance from torch's parameters after 40 steps in torch and 40 in adamfn",
        "at most 1e-6 of the largest",
        "optax cannot read torch state",
        "[taking over a run](docs/taking_over_runs.md)",
    )


def _recorded(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())
