# SPDX-License-Identifier: Apache-2.0
"""What a step costs before it first runs, and the memory that it takes besides its arrays."""

import gc
import time
from statistics import median
from typing import Any

import jax
from step_candidates import (
    CANDIDATES,
    OPTAX,
    PACKED,
    STEP,
    STEP_8BIT,
    UPDATE,
    gradients,
    start,
)

STAGES = ("trace", "lower", "compile", "first_step")
MEASURED = (OPTAX, UPDATE, STEP, PACKED, STEP_8BIT)


def measure(name: str, grads: dict) -> dict[str, float]:
    """Seconds of each stage from cold caches, and bytes of temporary arrays."""
    params, state = start(CANDIDATES[name], grads)
    jax.clear_caches()
    gc.collect()
    times = [time.perf_counter()]
    traced = jax.jit(CANDIDATES[name].step, donate_argnums=(0, 1)).trace(params, state, grads)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    jax.block_until_ready(compiled(params, state, grads))
    times.append(time.perf_counter())
    seconds = {stage: b - a for stage, a, b in zip(STAGES, times, times[1:], strict=False)}
    analysis: Any = compiled.memory_analysis()  # None where a backend has none
    return {**seconds, "temporary_bytes": getattr(analysis, "temp_size_in_bytes", None)}


def summarize(rounds: list[dict[str, float]], base: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, and how many times cheaper than the base of the same round."""

    def cheaper(*stages: str) -> dict[str, float]:
        pairs = zip(base, rounds, strict=True)
        ratios = sorted(sum(b[s] for s in stages) / sum(r[s] for s in stages) for b, r in pairs)
        return {"median": median(ratios), "min": ratios[0], "max": ratios[-1]}

    return {
        "seconds": {stage: median(r[stage] for r in rounds) for stage in STAGES},
        "temporary_bytes": rounds[0]["temporary_bytes"],
        "times_cheaper_than_optax": {
            "trace_and_lower": cheaper("trace", "lower"),
            "compile": cheaper("compile"),
        },
    }


def cost(shapes: dict, rounds: int) -> dict[str, dict[str, Any]]:
    """Of each that is measured, taking turns."""
    grads = gradients(shapes)
    samples = {name: [] for name in MEASURED}
    for i in range(rounds):
        for name in MEASURED if i % 2 else reversed(MEASURED):
            samples[name].append(measure(name, grads))
    return {name: summarize(own, samples[OPTAX]) for name, own in samples.items()}
