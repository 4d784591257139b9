# SPDX-License-Identifier: Apache-2.0
"""The accelerators whose compilers run here without them, and what is wrong if they cannot."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from .environment import quiet

DEVICE = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: {cores} fpus_per_core: 128 clock_rate_ghz: {clock} l2_cache_size: {cache}
  device_memory_size: {memory} memory_bandwidth: {bandwidth}
  cuda_compute_capability {{ major: {capability} feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{name}"
"""
"""A GPU in the words of XLA's compiler; the numbers are those of its own target descriptions."""


class Kind(NamedTuple):
    """What an accelerator is called, and how its topologies are spelled."""

    name: str
    chips: str
    """The smallest topology that its compiler takes."""
    gpu: dict[str, Any] | None = None


KINDS = {
    "v5e": Kind("TPU v5e", "2x2"),
    "v5p": Kind("TPU v5p", "2x2x1"),
    "v6e": Kind("TPU v6e", "2x2"),
    "h100": Kind(
        "NVIDIA H100 80GB HBM3",
        "1",
        {
            "cores": 132,
            "clock": 1.98,
            "cache": 52428800,
            "memory": 84942979072,
            "bandwidth": 3352320000000,
            "capability": 9,
        },
    ),
    "b200": Kind(
        "NVIDIA B200",
        "1",
        {
            "cores": 148,
            "clock": 1.965,
            "cache": 132644864,
            "memory": 191514411008,
            "bandwidth": 7672320000000,
            "capability": 10,
        },
    ),
}
EXAMPLES = "v5e:16x16, v5p:4x4x4, v6e:8x8, h100:8 or b200:4"


class UnavailableError(ValueError):
    """A machine that cannot be compiled for, or a mesh that it cannot be cut into."""


class Machine(NamedTuple):
    """The devices of a topology, and what their compiler is to be told."""

    topology: str
    name: str
    devices: Sequence[Any]
    platform: str
    compiler_options: dict[str, str]


def machine(topology: str) -> Machine:
    """The machine of this name.

    Args:
      topology: `v5e`, `v5p` or `v6e`, or one of these with its chips, such as `v5e:16x16` or
        `v5p:4x4x4`; `h100` or `b200`, or with their number, such as `h100:8`; `cpu`, this
        process's own devices.

    Raises:
      UnavailableError: no such machine is known, its compiler is not installed, or knows no such
        topology.
    """
    if topology == "cpu":
        return Machine("cpu", "CPU", jax.devices("cpu"), "cpu", {})
    kind_name, _, chips = topology.partition(":")
    kind = KINDS.get(kind_name)
    if kind is None:
        raise UnavailableError(
            f"The topology {topology!r} is unknown; expected one of {', '.join(KINDS)}, alone or"
            f" with its chips, such as {EXAMPLES}."
        )
    chips = chips or kind.chips
    try:
        with quiet():
            made = _tpu(kind_name, chips) if kind.gpu is None else _gpu(kind, kind_name, chips)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise UnavailableError(
            f"The compiler for {kind.name} does not know the topology {topology!r}; expected such"
            f" as {EXAMPLES}. It says: {str(error).splitlines()[0][:160]}"
        ) from error
    return made._replace(topology=topology, name=kind.name)


def mesh_of(machine: Machine, axes: dict[str, int]) -> Mesh:
    """A mesh of a machine's chips, with axes of type Auto.

    Raises:
      UnavailableError: the axes' sizes do not make up its number of chips.
    """
    chips = len(machine.devices)
    if np.prod(list(axes.values()), dtype=int) != chips:
        sizes = ", ".join(f"{name}={size}" for name, size in axes.items())
        raise UnavailableError(
            f"The mesh {sizes} does not fit {machine.topology}, whose number of chips is {chips};"
            f" expected axes whose sizes multiply to {chips}."
        )
    devices = np.array(machine.devices).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def _tpu(kind: str, chips: str) -> Machine:
    if find_spec("libtpu") is None:
        raise UnavailableError(
            f"To compile for {kind} the package libtpu is needed, and it is not installed; install"
            ' it with pip install "jax[tpu]".'
        )
    found = topologies.get_topology_desc(f"{kind}:{chips}", platform="tpu")
    return Machine("", "", found.devices, "tpu", {})


def _gpu(kind: Kind, name: str, chips: str) -> Machine:
    packages = ("jax_cuda12_plugin", "nvidia", "nvidia.cuda_nvcc")  # a parent before its child
    if any(find_spec(package) is None for package in packages):
        raise UnavailableError(
            f"To compile for {name} the packages jax-cuda12-plugin and nvidia-cuda-nvcc-cu12 are"
            ' needed, and they are not installed; install them with pip install "jax[cuda12-local]"'
            " nvidia-cuda-nvcc-cu12."
        )
    if not chips.isdigit() or int(chips) == 0:
        raise UnavailableError(
            f"The topology {name}:{chips} is unknown; expected such as {name}:8."
        )
    found = topologies.get_topology_desc(
        name,
        platform="cuda",
        target_config=DEVICE.format(name=kind.name, **kind.gpu),
        topology=f"1x1x{chips}",
    )
    spec = find_spec("nvidia.cuda_nvcc")
    folder = next(iter(spec.submodule_search_locations))
    options = {"xla_gpu_autotune_level": "0", "xla_gpu_cuda_data_dir": str(Path(folder))}
    return Machine("", "", found.devices, "gpu", options)
