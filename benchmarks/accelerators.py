# SPDX-License-Identifier: Apache-2.0
"""What an update costs on accelerators, by their own compilers: traffic, memory, kernels.

No TPU or GPU is needed, only its compiler: `libtpu`, or `jax-cuda12-plugin` and
`nvidia-cuda-nvcc-cu12`. Nothing runs, and nothing is timed but the compilers. Results of machines,
trees and candidates that are not measured this time stay as they are.

    make bench-accelerators
    python benchmarks/accelerators.py --machines v5e --trees "large matrix" --only "step 8bit"
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from ahead_of_time import environment

if __name__ == "__main__":
    environment.prepare()

import jax
from ahead_of_time.candidates import FORMATS, Candidate, by_step, candidates
from ahead_of_time.cost import Cost, cost, on, one_chip
from ahead_of_time.machines import KINDS, Machine, UnavailableError, machine, mesh_of
from ahead_of_time.meshes import adam_on_mesh, cost_on_mesh, split_by
from ahead_of_time.trees import LLAMA_8B, LLAMA_8B_FULLY_SPLIT, LLAMA_8B_SPLIT, TREES, abstract
from lean import RESULTS, version

OUT = RESULTS / "accelerators.json"
DTYPES = ("float32", "bfloat16")
MESHES = {
    "v5e:16x16": {"data": 16, "model": 16},
    "v5p:4x4x4": {"data": 16, "model": 4},
    "h100:8": {"data": 2, "model": 4},
}
"""Topologies, and the axes that their chips are cut into."""

LAYOUTS = {"ZeRO-1": (LLAMA_8B_SPLIT, "data"), "fully sharded": (LLAMA_8B_FULLY_SPLIT, None)}
"""How parameters are split, and the axis along which what is kept of them is split further."""

LIBRARIES = ("jax", "adamfn", "optax", "flashoptim-jax", "libtpu", "jax-cuda12-plugin")
LIBRARIES += ("nvidia-cuda-nvcc-cu12",)


def of_parameters(cost: Cost, parameters: int) -> dict[str, Any]:
    """A row of one chip: bytes of each parameter."""
    shares = {
        name: round(getattr(cost, name) / parameters, 3) for name in ("moved", "least", "temporary")
    }
    return {**shares, "kernels": cost.kernels, "seconds": round(cost.seconds, 1)}


def of_a_chip(cost: Cost) -> dict[str, Any]:
    """A row of a mesh: bytes on each chip."""
    names = ("moved", "arguments", "state", "temporary", "kernels", "collectives", "collected")
    return {**{name: getattr(cost, name) for name in names}, "seconds": round(cost.seconds, 1)}


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row, or the first line of what the compiler says against it."""
    try:
        return measure()
    except Exception as error:  # whatever a peer's kernel or a compiler fails with
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}


def update(candidate: Candidate, params: Any, on_machine: Machine) -> dict[str, Any]:
    """A row of one chip."""
    chip = one_chip(on_machine)
    state = on(chip, jax.eval_shape(candidate.init, params))
    params = on(chip, params)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    return of_parameters(cost(candidate.step, params, state, params, on_machine), parameters)


def llama(moments: str, topology: str, layout: str) -> dict[str, Any]:
    """A row of a mesh: Llama's 8B in bfloat16, by `step`."""
    chips, (split, zero_axis) = machine(topology), LAYOUTS[layout]
    params = abstract(LLAMA_8B, "bfloat16")
    shardings = split_by(split, params, mesh_of(chips, MESHES[topology]))
    candidate = by_step(adam_on_mesh(moments, params, shardings, zero_axis))
    return of_a_chip(cost_on_mesh(candidate, params, shardings, zero_axis, chips))


def versions() -> dict[str, str]:
    """Of the libraries that take part."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write(path: Path, recorded: dict[str, Any]) -> None:
    """Writes JSON with each row on a line of its own."""

    def text(node: Any, depth: int) -> str:
        if not isinstance(node, dict) or "seconds" in node or "error" in node or "jax" in node:
            return json.dumps(node)
        inner = ",\n".join(
            f"{' ' * (depth + 1)}{json.dumps(k)}: {text(v, depth + 1)}" for k, v in node.items()
        )
        return f"{{\n{inner}\n{' ' * depth}}}"

    path.write_text(text(recorded, 0) + "\n")


def main(argv: list[str] | None = None) -> None:
    args = parsed(argv)
    recorded = json.loads(args.out.read_text()) if args.out.exists() else {}

    def record(row: dict[str, Any], *keys: str) -> None:
        node = recorded
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = row
        write(args.out, recorded)
        print(*keys, json.dumps(row), flush=True)

    def wanted(name: str) -> bool:
        return not args.only or any(word in name for word in args.only)

    for topology in args.machines:
        chips = machine(topology)
        record({"name": chips.name, **versions()}, "machines", topology)
        for tree in args.trees:
            for dtype in args.dtypes:
                params = abstract(TREES[tree], dtype)
                for name, candidate in candidates(dtype, chips.platform).items():
                    if wanted(name):
                        row = attempt(partial(update, candidate, params, chips))
                        record(row, "updates", topology, tree, dtype, name)
    for topology in args.meshes:
        chips = machine(topology)
        record({"name": chips.name, **versions()}, "machines", topology)
        for layout in LAYOUTS:
            for moments in FORMATS:
                if wanted(f"step {moments}"):
                    row = attempt(partial(llama, moments, topology, layout))
                    record(row, "meshes", topology, layout, f"step {moments}")


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machines", nargs="*", default=[], help=f"of {', '.join(KINDS)}")
    parser.add_argument("--meshes", nargs="*", default=[], help=f"of {', '.join(MESHES)}")
    parser.add_argument("--trees", nargs="+", choices=TREES, default=list(TREES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--only", nargs="+", help="words of which a candidate's name has one")
    parser.add_argument("--out", type=Path, default=OUT, help="the results, added to")
    args = parser.parse_args(argv)
    for topology in args.meshes:
        if topology not in MESHES:
            parser.error(f"--meshes {topology}: expected one of {', '.join(MESHES)}")
    for topology in [*args.machines, *args.meshes]:
        try:
            machine(topology)
        except UnavailableError as error:
            parser.error(str(error))
    return args


if __name__ == "__main__":
    sys.exit(main())
