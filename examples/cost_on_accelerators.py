# SPDX-License-Identifier: Apache-2.0
"""Report the cost of the optimizer on each chip of a TPU or GPU, without the device.

The accelerator's compiler reports it for every format, on any machine; nothing runs. Install it by
`pip install "jax[tpu]"`, or by `pip install "jax[cuda12-local]" nvidia-cuda-nvcc-cu12`.

    python examples/cost_on_accelerators.py --model gpt2-small --topology v5e
    python examples/cost_on_accelerators.py --model llama-8b --topology h100:8 --mesh data=4,model=2

For your own model, pass `--model module:function`. The function takes no arguments and returns the
parameters or their shapes, or a pair of these and a tree of `PartitionSpec`s:

    def shapes():
        return jax.eval_shape(lambda: nnx.as_pure(nnx.state(Model(nnx.Rngs(0)), nnx.Param)))
"""

import argparse
import importlib
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any


def interrupted(*_: object) -> None:
    """Ends the program at once, and shows the cursor that a spinner has hidden."""
    show_cursor = b"\x1b[?25h" if sys.stdout.isatty() else b""
    os.write(sys.stdout.fileno(), show_cursor + b"\nInterrupted.\n")
    os._exit(130)


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # it analyses compiled programs
from ahead_of_time import environment

if __name__ == "__main__":  # before the imports, which take seconds
    signal.signal(signal.SIGINT, interrupted)
    environment.prepare()

import jax
import model_trees
from ahead_of_time import candidates, cost, machines, meshes, trees
from jax.sharding import NamedSharding, PartitionSpec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import adamfn

MODELS = {
    "gpt2-small": model_trees.gpt2_small,
    "resnet-50": model_trees.resnet50,
    "llama-8b": lambda: trees.LLAMA_8B,
}
WAYS = {"step": candidates.by_step, "update": candidates.by_update}
GREY, BLUE, ORANGE = "#8a8a8a", "#1f6fb4", "#e0a458"
console = Console()


def parameters(model: str, dtype: str | None) -> tuple[Any, Any]:
    """The shapes and dtypes of a model's parameters, and their specs if it has some.

    Raises:
      machines.UnavailableError: there is no such model.
    """
    if model in MODELS:
        return trees.abstract(MODELS[model](), dtype or "float32"), None
    module, colon, function = model.partition(":")
    if not colon:
        raise machines.UnavailableError(
            f"The model {model!r} is unknown; expected one of {', '.join(MODELS)}, or"
            " module:function for one of your own."
        )
    sys.path.append(os.getcwd())
    try:
        returned = getattr(importlib.import_module(module), function)()
    except (ModuleNotFoundError, AttributeError) as error:
        raise machines.UnavailableError(
            f"The model {model!r} could not be made: {error}; expected the name of a module here,"
            " and of a function in it that takes nothing."
        ) from error
    shapes, specs = returned if isinstance(returned, tuple) else (returned, None)

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype)

    return jax.tree.map(abstract, shapes), specs


def axes_of(text: str) -> dict[str, int]:
    """Parses `data=16,model=16`."""
    try:
        return {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not such as data=16,model=16") from None


def placed(params: Any, specs: Any, mesh: jax.sharding.Mesh) -> Any:
    """A sharding for each parameter: by its spec, or along `model` where that divides most.

    Raises:
      machines.UnavailableError: a spec names an axis that the mesh does not have.
    """

    def along_model(leaf: Any) -> PartitionSpec:
        size = mesh.shape.get("model", 1)
        divided = [d for d, n in enumerate(leaf.shape) if n % size == 0]
        if size == 1 or len(leaf.shape) < 2 or not divided:
            return PartitionSpec()
        longest = max(divided, key=lambda d: leaf.shape[d])
        return PartitionSpec(*(None,) * longest, "model")

    def sharding(spec: PartitionSpec) -> NamedSharding:
        for axis in jax.tree.leaves(tuple(spec)):
            if isinstance(axis, str) and axis not in mesh.axis_names:
                raise machines.UnavailableError(
                    f"A parameter is to be split along the axis {axis!r}, which the mesh does not"
                    f" have; it has {', '.join(map(repr, mesh.axis_names))}: name another in the"
                    " spec, or give --mesh that axis."
                )
        return NamedSharding(mesh, spec)

    specs = jax.tree.map(along_model, params) if specs is None else specs
    return jax.tree.map(sharding, specs, is_leaf=lambda node: isinstance(node, PartitionSpec))


def measured(args: argparse.Namespace) -> dict[str, cost.Cost | str]:
    """The cost in each format, or the compiler's error.

    Raises:
      ValueError, TypeError: the model, the machine, the mesh or the shardings do not work.
    """
    params, specs = parameters(args.model, args.dtype)
    machine = machines.machine(args.topology)
    mesh = machines.mesh_of(machine, args.mesh) if args.mesh else None
    if args.zero_axis and not mesh:
        raise machines.UnavailableError("--zero-axis is an axis of the mesh; give --mesh too.")
    shardings = placed(params, specs, mesh) if mesh else cost.one_chip(machine)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    where = f"a mesh of {len(machine.devices)}" if mesh else "one"
    console.print(f"[bold]{args.model}[/]: {count:,} parameters, on {where} {machine.name}")

    found: dict[str, cost.Cost | str] = {}
    for moments in args.moments:
        on_mesh = params, shardings, args.zero_axis
        tx = meshes.adam_on_mesh(moments, *on_mesh) if mesh else adamfn.adam(1e-3, moments=moments)
        candidate = WAYS[args.by](tx)
        with console.status(f"{machine.name}'s compiler takes Adam in {moments} ..."):
            try:
                if mesh:
                    own = meshes.cost_on_mesh(candidate, params, shardings, args.zero_axis, machine)
                else:
                    state = cost.on(shardings, jax.eval_shape(candidate.init, params))
                    here = cost.on(shardings, params)
                    own = cost.cost(candidate.step, here, state, here, machine)
            except jax.errors.JaxRuntimeError as error:
                own = str(error).splitlines()[0]
        found[moments] = own
    return found


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def show(found: dict[str, cost.Cost | str]) -> None:
    """A table, and bars of the memory that each format needs."""
    table = Table("moments", title="MiB on each chip", title_justify="left", box=SIMPLE_HEAD)
    for name in ("state", "temporary", "in all", "moved", "at least"):
        table.add_column(name, justify="right")
    table.add_column("collectives")
    rows = {moments: row for moments, row in found.items() if not isinstance(row, str)}
    for moments, row in rows.items():
        sizes = (row.state, row.temporary, row.arguments + row.temporary, row.moved, row.least)
        kinds = ", ".join(f"{n} {kind}" for kind, n in row.collectives.items())
        table.add_row(moments, *map(mib, sizes), kinds or "none")
    console.print(table)
    for moments, error in found.items():
        if moments not in rows:
            console.print(f"{moments} does not compile: {error}", soft_wrap=True)
    most = max((row.state + row.temporary for row in rows.values()), default=1)
    for moments, row in rows.items():
        state, temporary = (round(60 * n / most) for n in (row.state, row.temporary))
        console.print(f"{moments:>10} [{BLUE}]{'█' * state}[/][{ORANGE}]{'█' * temporary}[/]")
    console.print(
        f"{'':>10} [{BLUE}]state[/], [{ORANGE}]temporary memory[/]\n\n"
        "In all: parameters, gradients, state and temporary memory.\n"
        "Moved: bytes that kernels read from the chip's memory and write to it.\n"
        "The compiler reported these figures; nothing ran."
    )


def draw(found: dict[str, cost.Cost | str], title: str, path: Path) -> None:
    """The memory of a chip and the memory traffic of an update, for each format."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = {moments: row for moments, row in found.items() if not isinstance(row, str)}
    figure, (held, moved) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    names, left = list(rows), [0.0] * len(rows)
    parts = {
        "parameters and gradients": (GREY, [r.arguments - r.state for r in rows.values()]),
        "state": (BLUE, [r.state for r in rows.values()]),
        "temporary": (ORANGE, [r.temporary for r in rows.values()]),
    }
    for name, (color, sizes) in parts.items():
        widths = [size / 2**30 for size in sizes]
        held.barh(names, widths, left=left, color=color, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    moved.barh(names, [r.moved / 2**30 for r in rows.values()], color="#a9cdee", label="moved")
    moved.barh(names, [r.least / 2**30 for r in rows.values()], 0.3, color=BLUE, label="at least")
    held.set(xlabel="GiB that a chip holds", title=title)
    moved.set(xlabel="GiB that an update moves on a chip")
    held.invert_yaxis()
    for panel in (held, moved):
        panel.legend(frameon=False, fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, cost.Cost | str]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = ", ".join(MODELS)
    parser.add_argument("--model", default="gpt2-small", help=f"{models} or module:function")
    parser.add_argument("--topology", default="v5e", help=f"such as {machines.EXAMPLES} (v5e)")
    parser.add_argument("--mesh", type=axes_of, help="axes, such as data=16,model=16 (one chip)")
    parser.add_argument("--zero-axis", help="a further axis that splits the state")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the parameters")
    parser.add_argument("--moments", nargs="+", default=candidates.FORMATS, help="(every format)")
    parser.add_argument("--by", choices=WAYS, default="step", help="(step)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture (out)")
    args = parser.parse_args(argv)
    try:
        found = measured(args)
    except (ValueError, TypeError) as error:
        parser.exit(2, f"{error}\n")
    show(found)
    picture = args.out / "cost_on_accelerators.png"
    draw(found, f"{args.model} on {args.topology}", picture)
    console.print(f"Drawn to {picture}")
    return found


if __name__ == "__main__":
    main()
