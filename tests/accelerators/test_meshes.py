"""Lean moments on a mesh: Llama's 8B in bfloat16, its state split along the batches' axis too."""

import functools
from types import SimpleNamespace

import pytest
from accelerators import MESHES
from ahead_of_time import candidates, machines, meshes, trees

import adamfn

MESH_OF = {"v5e": "v5e:16x16", "v5p": "v5p:4x4x4", "h100": "h100:8"}


@pytest.fixture(scope="module")
def on_mesh(machine):
    chips = machines.machine(MESH_OF[machine.topology])
    params = trees.abstract(trees.LLAMA_8B, "bfloat16")
    mesh = machines.mesh_of(chips, MESHES[chips.topology])
    shardings = meshes.split_by(trees.LLAMA_8B_SPLIT, params, mesh)

    @functools.cache
    def measured(moments):
        candidate = candidates.by_step(adamfn.adam(1e-3, moments=moments))
        found = meshes.cost_on_mesh(candidate, params, shardings, "data", chips)
        return SimpleNamespace(**found._asdict(), collected_by=sum(found.collectives.values()))

    return measured


@pytest.mark.parametrize("moments", ["8bit", "4bit"])
def test_a_chip_needs_less_than_with_float32(on_mesh, moments):
    lean, plain = on_mesh(moments), on_mesh("float32")
    assert lean.temporary <= plain.temporary
    assert lean.arguments + lean.temporary <= 0.8 * (plain.arguments + plain.temporary)
    assert lean.collected_by <= plain.collected_by
    assert lean.seconds < 60
