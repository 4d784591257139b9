# SPDX-License-Identifier: Apache-2.0
"""The settings of the native code: how fast a step is with others, on the processor at hand.

Builds adamfn/backends/cpu/kernels.cc with one setting changed at a time, and lets the builds take
turns in one process over several trees, for float32, bfloat16 and 8-bit moments and for weights of
24 bits. A figure is how many times as fast as with the settings that ship. Beside them stands the
time of the seven streams of memory that a float32 step reads and writes.

Takes 4 GB and a machine that does nothing else. Processors have files of their own.

    python benchmarks/native_sweep.py     # writes benchmarks/results/native_sweep/<processor>.json
    python benchmarks/native_sweep.py --trees MLP --rounds 2 --out /dev/null
"""

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import model_trees
import numpy as np
import step_candidates
from lean import RESULTS, machine, save
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adamfn.backends.calls import _LEAVES, LARGE

BENCHMARKS = Path(__file__).parent
KERNELS = BENCHMARKS.parent / "adamfn" / "backends" / "cpu"
TREES = {
    "GPT-2 small": model_trees.gpt2_small,
    "ResNet-50": model_trees.resnet50,
    "one leaf of 2^24": lambda: model_trees.one_leaf(2**24),
    "1000 leaves of 1000": model_trees.thousand_leaves,
    "MLP": model_trees.mlp,
}
FORMATS = {"float32": (0, 0), "bfloat16": (1, 0), "8bit": (3, 0), "24-bit weights": (0, 24)}
"""The native code's numbers: how moments are stored, and bits of a weight (0: float32)."""

AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
LEAST = 0.02
"""Seconds of a sample, at least."""


class Setting(NamedTuple):
    """What a build changes in the sources, and the flags that it is compiled with."""

    constants: tuple[tuple[str, str], ...] = ()
    """Names of constants and their values."""
    flags: tuple[str, ...] = (*AVX512, "-mprefer-vector-width=512")


SHIPPED = "as it ships on Intel's"
SETTINGS = {
    SHIPPED: Setting(),
    "no read-ahead": Setting(flags=(*Setting().flags, "-DREADS_AHEAD=false")),
    **{
        f"read-ahead of {ahead}": Setting((("kReadAhead", f"{ahead}"),))
        for ahead in (512, 1024, 2048)
    },
    **{f"tiles of {size}": Setting((("kTile", f"{size}"),)) for size in (256, 512)},
    "small tasks": Setting((("kLeastTiles = 64, kMostTiles", "128"),)),
    "large tasks": Setting((("kLeastTiles = 64, kMostTiles", "2048"),)),
    "threads for less": Setting((("kTilesPerThread", "64"),)),
    "256-bit vectors": Setting(flags=(*AVX512, "-mprefer-vector-width=256")),
    "-march=native": Setting(flags=("-march=native",)),
    "AVX2": Setting(flags=AVX2),
    "SSE4": Setting(flags=("-msse4.2",)),
}


def build(setting: Setting, folder: Path) -> ctypes.CDLL:
    """The native code with a setting, as a library without XLA."""
    shutil.copytree(KERNELS, folder, ignore=shutil.ignore_patterns("*.py", "*.so", "__pycache__"))
    changes = [
        (rf"({re.escape(name)} = )\d+", rf"\g<1>{value}") for name, value in setting.constants
    ]
    for pattern, replacement in changes:
        made = 0
        for source in folder.iterdir():
            text, times = re.subn(pattern, replacement, source.read_text())
            made += times
            source.write_text(text)
        if made != 1:
            raise RuntimeError(f"{pattern} is {made} times in the sources")
    library = folder / "workload.so"
    flags = "-std=c++17 -O3 -DNDEBUG -fno-math-errno -fno-trapping-math -fPIC -shared -pthread"
    named = ["-DADAMFN_VARIANT=swept", f"-I{folder}", "-o", str(library)]
    sources = [str(BENCHMARKS / "native" / "workload.cc"), str(folder / "kernels.cc")]
    command = [step_candidates.COMPILER or "c++", *flags.split(), *setting.flags, *named, *sources]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.new_workload.restype = ctypes.c_void_p
    loaded.run_workload.restype = ctypes.c_double
    return loaded


def calls(shapes: dict) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the leaves of each call, as `adamfn.step` makes them."""
    found = [leaf.shape for leaf in jax.tree.leaves(model_trees.abstract(shapes))]
    yield from ([shape] for shape in found if np.prod(shape) >= LARGE)
    small = sorted(shape for shape in found if np.prod(shape) < LARGE)
    yield from (small[k : k + _LEAVES] for k in range(0, len(small), _LEAVES))


def aligned(size: int, dtype: Any, value: float = 0) -> np.ndarray:
    """An array that begins at a line of the cache, as XLA's do."""
    bytes_ = size * np.dtype(dtype).itemsize
    memory = np.zeros(bytes_ + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array = memory[start : start + bytes_].view(dtype)
    array[:] = value
    return array


def workload(shapes: dict, format: int, bits: int) -> tuple[np.ndarray, np.ndarray, list]:
    """The numbers and the addresses of each leaf, and the arrays that these belong to."""
    numbers, addresses, arrays = [], [], []
    moment = {0: np.float32, 1: np.uint16, 3: np.uint8}[format]
    for call, leaves in enumerate(calls(shapes)):
        for shape in leaves:
            size, row = int(np.prod(shape)), shape[-1]
            block = min(256, row)
            own = [
                aligned(size, np.float32, 1e-3),
                aligned(size, np.uint16 if bits else np.float32),
            ]
            own += [aligned(size, moment) for _ in range(2)]
            blocks = size // row * -(-row // block) if format == 3 else 0
            own += [aligned(blocks, np.float32) for _ in range(3)]
            own += [aligned(size if bits else 0, np.int8)]
            numbers.append((call, size, row, block))
            addresses.append([array.ctypes.data for array in own])
            arrays.append(own)
    return np.array(numbers, np.int64), np.array(addresses, np.uint64), arrays


def measure(libraries: dict[str, ctypes.CDLL], tree: str, format: str, rounds: int) -> dict:
    """Seconds of a step by each build, and how many times as fast as the one that ships."""
    numbers, addresses, arrays = workload(TREES[tree](), *FORMATS[format])
    loads = {
        name: library.new_workload(
            *map(ctypes.c_int32, FORMATS[format]),
            *map(ctypes.c_int64, (os.cpu_count() or 1, len(numbers))),
            ctypes.c_void_p(numbers.ctypes.data),
            ctypes.c_void_p(addresses.ctypes.data),
        )
        for name, library in libraries.items()
    }

    def seconds(name: str, steps: int) -> float:
        load = ctypes.c_void_p(loads[name])
        return libraries[name].run_workload(load, ctypes.c_int64(steps)) / steps

    seconds(SHIPPED, 1)
    steps = max(1, int(LEAST / seconds(SHIPPED, 2)))
    samples = {name: [] for name in libraries}
    for i in range(rounds):
        for name in libraries if i % 2 else reversed(libraries):
            samples[name].append(seconds(name, steps))
    for name, library in libraries.items():
        library.free_workload(ctypes.c_void_p(loads[name]))
    del arrays
    ratios = {
        name: sorted(a / b for a, b in zip(samples[SHIPPED], own, strict=True))
        for name, own in samples.items()
    }
    return {
        "elements": int(numbers[:, 1].sum()),
        "seconds": {name: median(own) for name, own in samples.items()},
        "times_as_fast": {
            name: {"median": median(own), "min": own[0], "max": own[-1]}
            for name, own in ratios.items()
        },
    }


def streams(shapes: dict) -> float:
    """Seconds of the seven streams of memory of a float32 step."""
    elements = sum(
        int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(model_trees.abstract(shapes))
    )
    run, samples = step_candidates.seven_streams(elements), []
    for _ in range(5):
        times = max(1, 2**24 // elements)
        samples.append(step_seconds(run, times) / times)
    return median(samples)


def step_seconds(run: step_candidates.Run, times: int) -> float:
    from step_speed import seconds

    return seconds(run, times)


def processor_name() -> str:
    """The vendor, family and model of the processor, for a file's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    parts = (found.get(key, "") for key in ("vendor_id", "cpu family", "model"))
    return "-".join(filter(None, parts)).lower() or "unknown"


def show(results: dict[str, dict[str, dict]]) -> None:
    """Prints how many times as fast each setting is, in the median."""
    for format in FORMATS:
        shown = Table(title=f"{format}: times as fast as it ships (median)")
        shown.add_column("setting")
        for tree in results:
            shown.add_column(tree, justify="right")
        for name in next(iter(results.values()))[format]["seconds"]:
            own = (results[tree][format]["times_as_fast"][name]["median"] for tree in results)
            shown.add_row(name, *(f"{ratio:.2f}" for ratio in own))
        Console(width=120).print(shown)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trees", nargs="*", choices=TREES, default=[*TREES])
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument("--rounds", type=int, default=7)
    named = RESULTS / "native_sweep" / f"{processor_name()}.json"
    parser.add_argument("--out", type=Path, default=named)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        libraries = {
            name: build(setting, Path(folder, f"{k}"))
            for k, (name, setting) in enumerate(track(SETTINGS.items(), description="building"))
            if name == SHIPPED or name in args.settings
        }
        results = {
            tree: {
                format: measure(libraries, tree, format, args.rounds)
                for format in track(FORMATS, description=tree)
            }
            for tree in args.trees
        }
    limits = {tree: streams(TREES[tree]()) for tree in args.trees}
    show(results)
    recorded = {"machine": machine(), "rounds": args.rounds, "seven_streams": limits}
    save(args.out, recorded | {"results": results})


if __name__ == "__main__":
    main()
