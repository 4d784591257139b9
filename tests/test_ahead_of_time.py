# SPDX-License-Identifier: Apache-2.0
"""What is read from a compiled program: shapes, kernels, loops, and a copy that should not be."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import adamfn

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from ahead_of_time import candidates, cost, hlo, machines, meshes, traffic, trees

pytestmark = pytest.mark.optimized  # what compiled programs cost

MIB = 2**20
BUFFER = "f32[4,512,512]{2,1,0}"
LOOP = (Path(__file__).parent / "data" / "loop_over_chunks.hlo").read_text()


def entry(*lines, before=""):
    """A program of these instructions, which the last is the result of."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule one\n{before}\nENTRY %main (a: f32[]) -> f32[] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("type_", "expected"),
    [
        ("f32[16384,64]{1,0}", 4 * 16384 * 64),
        ("f32[16384,64]{1,0:T(8,128)}", 4 * 16384 * 128),  # lanes without numbers
        ("f32[16384,64]{0,1:T(8,128)}", 4 * 16384 * 64),
        ("s8[33,200]{1,0:T(32,128)(4,1)}", 64 * 256),
        ("bf16[3,5]{1,0}", 30),
        ("u4[64,128]{1,0:E(4)}", 4096),
        ("pred[7]", 7),
        ("f8e4m3fn[10]{0}", 10),
        ("c64[2]", 16),
        ("f32[]{:T(128)}", 4),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 0),  # near memory
        ("(f32[2]{0}, /*index=1*/s32[3]{0}, token[])", 20),
        ("f32[0,4]", 0),
    ],
)
def test_bytes_of_a_type(type_, expected):
    assert sum(array.bytes for array in hlo.arrays_of(type_)) == expected


def test_parts_of_an_instruction():
    line = (
        "ROOT %x.1 = (f32[2]{0:T(128)}, s32[]) custom-call(%a, f32[2]{0:T(128)} %b),"
        ' custom_call_target="k", calls=%c, branch_computations={%d, %e}'
    )
    program = hlo.parse(entry("%a = f32[2] parameter(0)", "%b = f32[2] parameter(1)", line))
    root = program.entry.root
    assert (root.name, root.opcode, root.operands) == ("x.1", "custom-call", ("a", "b"))
    assert root.named("calls", "branch_computations") == ["c", "d", "e"]


def test_a_loop_counts_its_chunks_as_often_as_it_runs():
    found = traffic.traffic(LOOP)
    # In each of four turns a slice of a MiB is read, through a fusion in a fusion, and one written.
    assert found.moved == pytest.approx(4 * 2 * MIB, rel=1e-4)
    assert found.kernels == 4
    noted = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert traffic.traffic(noted).kernels == 3


def test_a_loop_without_end_is_refused():
    endless = LOOP.replace("direction=LT", "direction=NE")
    with pytest.raises(ValueError, match="nothing says how often the loop loop runs"):
        traffic.traffic(endless)


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        traffic.traffic("HloModule nothing")


def test_a_custom_call_counts_operands_and_results():
    text = entry(
        f"%a = {BUFFER} parameter(0)",
        '%space = f32[4,512,512] custom-call(), custom_call_target="AllocateBuffer"',
        f"ROOT %k = ({BUFFER}, bf16[512,512]) custom-call(%a, %space), custom_call_target="
        '"tpu_custom_call", output_to_operand_aliasing={{0}: (0, {})}',
    )
    assert traffic.traffic(text)[:2] == ((4 + 4 + 4) * MIB + MIB // 2, 1)


def test_transfers_to_near_memory_count_their_far_end():
    text = entry(
        "%a = f32[512,512]{1,0:T(8,128)} parameter(0)",
        "%s = (f32[512,512]{1,0:T(8,128)S(1)}, f32[512,512]{1,0:T(8,128)}, u32[]{:S(2)})"
        " copy-start(%a)",
        "%d = f32[512,512]{1,0:T(8,128)S(1)} copy-done(%s)",
        "%p = ((f32[512,512]{1,0:T(8,128)}), f32[256,512]{1,0:T(8,128)S(1)}, s32[]{:S(2)})"
        " slice-start(%a), slice={[0:256], [0:512]}",
        "%q = f32[256,512]{1,0:T(8,128)S(1)} slice-done(%p)",
        "ROOT %n = f32[512,512]{1,0:T(8,128)} negate(%d)",
    )
    assert traffic.traffic(text)[:2] == (MIB + MIB // 2 + MIB, 0)  # a MiB is not yet a kernel


def test_collectives_are_counted_within_fusions_and_loops_too():
    inner = (
        "%gathered (x: f32[512,512]) -> f32[4,512,512] {\n"
        "  %x = f32[512,512] parameter(0)\n"
        "  ROOT %g = f32[4,512,512] all-gather(%x), dimensions={0}\n}\n"
    )
    text = entry(
        "%a = f32[512,512] parameter(0)",
        "%f = f32[4,512,512] fusion(%a), kind=kCustom, calls=%gathered",
        "%s = (f32[512,512], f32[4,512,512]) all-gather-start(%a), dimensions={0}",
        "%d = f32[4,512,512] all-gather-done(%s)",
        "ROOT %r = f32[512,512] all-reduce(%a), to_apply=%sum",
        before=inner,
    )
    found = traffic.traffic(text)
    assert found.collectives == {"all-gather": 2, "all-reduce": 1}
    assert found.collected == (4 + 4 + 1) * MIB
    assert found.moved == (5 + 5 + 2) * MIB


def test_the_costlier_branch_of_a_conditional_counts():
    branches = (
        f"%cheap (x: f32[4,512,512]) -> f32[4,512,512] {{\n  ROOT %x = {BUFFER} parameter(0)\n}}\n"
        f"%dear (y: f32[4,512,512]) -> f32[4,512,512] {{\n  %y = {BUFFER} parameter(0)\n"
        f"  ROOT %c = {BUFFER} copy(%y)\n}}\n"
    )
    text = entry(
        "%i = s32[] parameter(0)",
        f"%a = {BUFFER} parameter(1)",
        f"ROOT %r = {BUFFER} conditional(%i, %a, %a), branch_computations={{%cheap, %dear}}",
        before=branches,
    )
    assert traffic.traffic(text).moved == 8 * MIB


@pytest.fixture(scope="module")
def cpu():
    return machines.machine("cpu")


def compiled(machine, step, shape=(1024, 4096)):
    """The cost of float32 Adam on one leaf, moved by this step."""
    chip = cost.one_chip(machine)
    params = cost.on(chip, {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)})
    state = cost.on(chip, jax.eval_shape(adamfn.adam().init, params))
    return cost.cost(step, params, state, params, machine)


def test_a_deliberate_copy_shows(cpu):
    step = candidates.by_step(adamfn.with_backend(adamfn.adam(), "xla")).step

    def with_copy(params, state, grads):
        # No optimization barrier outlives XLA on CPU; a sort is fused with nothing.
        grads = jax.tree.map(lambda g: jax.lax.sort(g, dimension=1), grads)
        return step(params, state, grads)

    plain, copied = compiled(cpu, step), compiled(cpu, with_copy)
    leaf = 4 * 1024 * 4096
    assert plain.least == 7 * leaf + 24  # with the count and two rates
    assert plain.moved == pytest.approx(10 * leaf, rel=1e-4)  # by XLA on CPU, in three kernels
    assert copied.moved == pytest.approx(12 * leaf, rel=1e-4)
    assert copied.kernels == plain.kernels + 1
    assert copied.temporary - plain.temporary == pytest.approx(leaf, rel=1e-4)


def test_a_loop_over_chunks_shows_no_more_than_its_chunks(cpu):
    def chunks(x):
        def chunk(i, x):
            part = jax.lax.dynamic_slice_in_dim(x, 128 * i, 128)
            return jax.lax.dynamic_update_slice_in_dim(x, jnp.sqrt(part), 128 * i, 0)

        return jax.lax.fori_loop(0, 8, chunk, x)

    x = jax.ShapeDtypeStruct((1024, 4096), jnp.float32)
    text = jax.jit(chunks, donate_argnums=0).lower(x).compile().as_text()
    assert "while" in text
    assert traffic.traffic(text).moved == pytest.approx(2 * 4 * 1024 * 4096, rel=0.01)


def test_unknown_topologies_are_refused_by_name():
    with pytest.raises(
        machines.UnavailableError, match=r"'v9x:2x2' is unknown; expected one of v5e"
    ):
        machines.machine("v9x:2x2")


@pytest.mark.parametrize(("topology", "package"), [("v5e:2x2", "libtpu"), ("h100", "jax-cuda12")])
def test_a_missing_compiler_is_named_with_the_way_out(monkeypatch, topology, package):
    monkeypatch.setattr(machines, "find_spec", lambda name: None)
    with pytest.raises(machines.UnavailableError, match=rf"{package}.*pip install"):
        machines.machine(topology)


def test_a_plugin_without_its_assembler_is_refused_too(monkeypatch):
    found = {"jax_cuda12_plugin": object()}
    monkeypatch.setattr(machines, "find_spec", found.get)
    with pytest.raises(machines.UnavailableError, match="nvidia-cuda-nvcc-cu12"):
        machines.machine("b200")


def test_a_mesh_that_does_not_fit_is_refused(cpu):
    chips = len(cpu.devices)
    with pytest.raises(
        machines.UnavailableError, match=f"data=3, model=5 does not fit cpu.* {chips}"
    ):
        machines.mesh_of(cpu, {"data": 3, "model": 5})


def test_a_spec_of_an_axis_that_is_not_there_is_refused(cpu):
    mesh = machines.mesh_of(cpu, {"data": len(cpu.devices)})
    params = trees.abstract({"kernel": (64, 64)}, "float32")
    with pytest.raises(machines.UnavailableError, match=r"'kernel'.*'model'.*'data'"):
        meshes.split_by({"kernel": (None, "model")}, params, mesh)


def test_llama_has_its_parameters():
    sizes = [x.size for x in jax.tree.leaves(trees.abstract(trees.LLAMA_8B, "bfloat16"))]
    assert sum(sizes) == 8030261248
