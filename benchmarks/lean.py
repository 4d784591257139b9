# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of moments in fewer bytes, and of a step's speed, share."""

import json
import logging
import os
import platform
import warnings
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

import adamfn

BENCHMARKS = Path(__file__).parent
RESULTS, DOCS = BENCHMARKS / "results", BENCHMARKS.parent / "docs"
FORMATS = ("float32", "bfloat16", "8bit", "4bit", "factored", "blockmean")


def chosen(moments: str) -> dict[str, str]:
    """The keyword argument that picks a format; none for what every version has."""
    return {} if moments == "float32" else {"moments": moments}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "processor": processor(),
        "python": platform.python_version(),
        "backend": jax.default_backend(),
    }


def processor() -> str | None:
    """What the processor calls itself, where the system says it as Linux does."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None)


def versions() -> dict[str, str]:
    """Of the libraries that take part, where they are installed."""
    names = ("jax", "adamfn", "optax", "torch", "torchao", "bitsandbytes", "flashoptim-jax")
    names += ("flashoptim",)
    return {name: version(name) for name in names if find_spec(name.replace("-", "_"))}


def version(name: str) -> str:
    found = adamfn.__version__ if name == "adamfn" else metadata.version(name)
    return found.partition("+")[0]  # without what the build is for


def save(path: Path, recorded: dict) -> None:
    """Writes JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(recorded, indent=2) + "\n"
    if path.exists() and not path.is_file():  # /dev/null
        path.write_text(text)
        return
    beside = path.with_suffix(".part")
    beside.write_text(text)
    beside.replace(path)


def quieten(eager: bool = False) -> None:
    """Hides what the peers say of the GPUs that are not there.

    Args:
      eager: keep torchao from compiling its updates, for which it needs a C++ compiler.
    """
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", module="torch")
    if eager:
        import torch

        torch.compiler.set_stance("force_eager")
