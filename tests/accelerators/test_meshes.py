# SPDX-License-Identifier: Apache-2.0
"""Lean moments on a mesh: Llama's 8B in bfloat16, its state split along the batches' axis too."""

import functools
from types import SimpleNamespace

import pytest
from accelerators import LAYOUTS, MESHES
from ahead_of_time import candidates, machines, meshes, trees

MESH_OF = {"v5e": "v5e:16x16", "v5p": "v5p:4x4x4", "h100": "h100:8"}


@pytest.fixture(scope="module")
def on_mesh(machine):
    chips = machines.machine(MESH_OF[machine.topology])
    params = trees.abstract(trees.LLAMA_8B, "bfloat16")
    mesh = machines.mesh_of(chips, MESHES[chips.topology])

    @functools.cache
    def measured(layout, moments):
        split, zero_axis = LAYOUTS[layout]
        shardings = meshes.split_by(split, params, mesh)
        tx = meshes.adam_on_mesh(moments, params, shardings, zero_axis)
        candidate = candidates.by_step(tx)
        found = meshes.cost_on_mesh(candidate, params, shardings, zero_axis, chips)
        return SimpleNamespace(**found._asdict(), collected_by=sum(found.collectives.values()))

    return measured


HELD = {
    ("v5e", "ZeRO-1"): 0.96,
    ("v5e", "fully sharded"): 0.55,
    ("v5p", "ZeRO-1"): 0.96,
    ("v5p", "fully sharded"): 0.55,
    ("h100", "ZeRO-1"): 0.7,
    ("h100", "fully sharded"): 0.55,
}
"""Arguments and temporaries, of float32's. On TPUs with ZeRO the state is 7 per cent of float32's,
and the rest is gathered parameters."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("moments", ["8bit", "4bit"])
def test_a_chip_needs_less_than_with_float32(on_mesh, machine, moments, layout):
    lean, plain = on_mesh(layout, moments), on_mesh(layout, "float32")
    held = lean.arguments + lean.temporary
    assert held <= HELD[machine.topology, layout] * (plain.arguments + plain.temporary)
    assert lean.moved < plain.moved
    assert lean.collectives == plain.collectives
    assert lean.seconds < 60
