# SPDX-License-Identifier: Apache-2.0
"""Training on a mesh of eight: where the state is, what is sent, and that nothing changes."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import adamfn
from adamfn.sharding import state_shardings

MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
REPLICATED = jax.NamedSharding(MESH, jax.P())
BATCH = jax.NamedSharding(MESH, jax.P("data"))
SHAPES = {"kernel": (64, 512), "out": (512, 10), "bias": (512,), "odd": (99, 1024)}
"""`odd` is divided only along the axis of its blocks of 256, and within them: 128 to a device."""
STEPS, EXAMPLES, OF_BLOCKS = 20, 64, 99 * 4
MOMENTS = ("float32", "8bit", "4bit", "factored")


def params_of(shapes):
    random = np.random.default_rng(0)
    return {
        name: (random.normal(size=shape) / shape[0] ** 0.5).astype(np.float32)
        for name, shape in shapes.items()
    }


PARAMS = params_of(SHAPES)


def whole_numbers(step, shapes=SHAPES):
    """A batch for `weighted`: small whole numbers, whose sums are exact in any order."""
    random = np.random.default_rng(step)
    return {
        name: [
            random.integers(-3, 4, (EXAMPLES, length)).astype(np.float32)
            for length in (shape[0] if len(shape) > 1 else 1, shape[-1])
        ]
        for name, shape in shapes.items()
    }


def weighted(params, batch):
    """A loss whose gradients are sums of whole numbers over the batch."""
    return sum(
        jnp.mean(jnp.sum((batch[name][0] @ p.reshape(-1, p.shape[-1])) * batch[name][1], -1))
        for name, p in params.items()
    )


def network(params, batch):
    """An ordinary loss. Its gradients' sums are rounded in another order on another mesh."""
    x, y = batch
    hidden = jnp.tanh(x @ params["kernel"] + params["bias"])
    return jnp.mean((hidden @ params["out"] - y) ** 2) + jnp.mean(params["odd"] ** 2)


def examples(step):
    random = np.random.default_rng(step)
    sizes = ((EXAMPLES, 64), (EXAMPLES, 10))
    return [random.normal(size=size).astype(np.float32) for size in sizes]


def step_of(tx, loss, way="update"):
    def step(params, state, batch):
        grads = jax.grad(loss)(params, batch)
        if way == "step":
            return adamfn.step(tx, grads, state, params)
        updates, state = tx.update(grads, state, params)
        return adamfn.apply_updates(params, updates), state

    return step


class Run:
    """A run on a mesh: `state` as `init` placed it, and `step`, compiled."""

    def __init__(self, tx, loss, batch, shapes=SHAPES, placed=REPLICATED, way="update"):
        self.batches = jax.NamedSharding(placed.mesh, jax.P("data"))
        params = params_of(shapes)
        self.shardings = state_shardings(tx, params, placed, zero_axis="data")
        self.init = jax.jit(tx.init, out_shardings=self.shardings).lower(params).compile()
        self.params, self.state = jax.device_put(params, placed), self.init(params)
        where = (placed, self.shardings)
        step = jax.jit(
            step_of(tx, loss, way),
            in_shardings=(*where, self.batches),
            out_shardings=where,
            donate_argnums=(0, 1),
        )
        self.step = step.lower(self.params, self.state, batch).compile()
        self.program = self.step.as_text()

    def train(self, batches):
        for batch in batches:
            batch = jax.device_put(batch, self.batches)
            self.params, self.state = self.step(self.params, self.state, batch)
        return self


def alone(tx, loss, batches, shapes=SHAPES):
    """Parameters and state of the same run on one device."""
    params, step = params_of(shapes), jax.jit(step_of(tx, loss))
    state = tx.init(params)
    for batch in batches:
        params, state = step(params, state, batch)
    return params, state


@functools.cache
def run_on_eight(moments, way="update"):
    """Twenty steps whose gradients are the same to the bit: what could differ is the state's."""
    run = Run(adamfn.adamw(1e-2, moments=moments), weighted, whole_numbers(0), way=way)
    return run.train(whole_numbers(step) for step in range(STEPS))


def sizes_of(program, operation):
    """How many elements each array has that an operation of a compiled program returns, by type."""
    lines = re.findall(rf"= (.*?) {operation}(?:-start)?\(", program)
    return [
        (dtype, math.prod(map(int, filter(None, shape.split(",")))))
        for line in lines
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", line)
    ]


@pytest.mark.parametrize("moments", MOMENTS)
def test_twenty_steps_equal_one_devices(moments):
    # By XLA as on the mesh: native code may round an ulp otherwise, and turn a code.
    tx = adamfn.with_backend(adamfn.adamw(1e-2, moments=moments), "xla")
    params, state = alone(tx, weighted, [whole_numbers(step) for step in range(STEPS)])
    for way in ("update", "step") if moments in ("float32", "8bit") else ("update",):
        compare(run_on_eight(moments, way), params, state)


def compare(run, params, state):
    """Parameters within rounding, codes to the bit."""
    for name in SHAPES:
        np.testing.assert_allclose(run.params[name], params[name], rtol=0, atol=1e-6)
    for on_eight, on_one in zip(*map(jax.tree.leaves, (run.state, state)), strict=True):
        if on_one.dtype in (jnp.int8, jnp.uint8, jnp.bfloat16):  # the noise is the same
            np.testing.assert_array_equal(np.asarray(on_eight), np.asarray(on_one))


def test_an_ordinary_loss_in_float32_too():
    tx, batches = adamfn.adamw(1e-3), [examples(step) for step in range(STEPS)]
    params, _ = alone(tx, network, batches)
    run = Run(tx, network, batches[0]).train(batches)
    for name in SHAPES:
        np.testing.assert_allclose(run.params[name], params[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("moments", MOMENTS)
def test_an_eighth_of_the_state_lies_on_each_device(moments):
    run = run_on_eight(moments)
    leaves = jax.tree.leaves(run.state)
    whole = sum(leaf.nbytes for leaf in leaves)
    for device in jax.devices():
        shards = [s.data for leaf in leaves for s in leaf.addressable_shards if s.device == device]
        assert sum(shard.nbytes for shard in shards) <= 0.14 * whole
    memory = run.init.memory_analysis()  # a device's; the pointers of the outputs count too
    assert memory.output_size_in_bytes <= 0.14 * whole + 8 * len(leaves)
    assert memory.temp_size_in_bytes <= 0.01 * whole


@pytest.mark.parametrize("moments", MOMENTS)
def test_no_moment_is_gathered(moments):
    check_gathered(moments, run_on_eight(moments).program)


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_a_step_gathers_as_little(moments):
    check_gathered(moments, run_on_eight(moments, "step").program)


def check_gathered(moments, program):
    gathered = sizes_of(program, "all-gather")
    updates = sorted(("f32", math.prod(shape)) for shape in SHAPES.values())
    # Each update once. Else only numbers of whole blocks, of `odd`, which are on every device.
    assert sorted(array for array in gathered if array[1] > OF_BLOCKS) == updates
    aligned = moments != "8bit"
    assert not aligned or len(gathered) == len(updates)
    assert not sizes_of(program, "all-to-all")
    assert not sizes_of(program, "collective-permute")


def test_the_state_stays_where_it_is_and_copies_agree():
    run = run_on_eight("8bit")
    for leaf, sharding in zip(*map(jax.tree.leaves, (run.state, run.shardings)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    for leaf in jax.tree.leaves(run.params):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == 8
        assert all(np.array_equal(copy, copies[0]) for copy in copies)


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_a_bad_shard_leaves_everything_as_it_was(moments):
    tx = optax.apply_if_finite(adamfn.adamw(1e-2, moments=moments), max_consecutive_errors=5)
    run = Run(tx, network, examples(0)).train([examples(0)])
    for number, bad in enumerate((np.nan, np.inf), start=1):
        before = shards_of((run.params, run.state.inner_state))
        poisoned = examples(number)
        poisoned[0][3 * EXAMPLES // 8] = bad  # an example of the fourth device's alone
        run.train([poisoned])
        assert int(run.state.total_notfinite) == number
        after = shards_of((run.params, run.state.inner_state))
        assert before.keys() == after.keys()
        for key in before:
            np.testing.assert_array_equal(before[key], after[key])
    kernel = np.asarray(run.params["kernel"])
    run.train([examples(3)])
    assert int(run.state.inner_state[0].count) == 2
    assert np.all(np.isfinite(run.params["kernel"]))
    assert not np.array_equal(run.params["kernel"], kernel)


def shards_of(tree):
    return {
        (jax.tree_util.keystr(path), shard.device.id): np.array(shard.data)
        for path, leaf in jax.tree.leaves_with_path(tree)
        for shard in leaf.addressable_shards
    }


def test_data_and_tensor_axes_together():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    shapes, split = {"kernel": (64, 512)}, jax.NamedSharding(mesh, jax.P(None, "model"))
    batches = [whole_numbers(step, shapes) for step in range(3)]
    tx = adamfn.adamw(1e-2, moments="8bit")
    params, _ = alone(tx, weighted, batches, shapes)
    run = Run(tx, weighted, batches[0], shapes, split).train(batches)
    np.testing.assert_allclose(run.params["kernel"], params["kernel"], rtol=0, atol=1e-6)
    codes = run.state[0].nu["kernel"]
    assert codes.addressable_shards[0].data.shape == (16, 256)
    assert not [array for array in sizes_of(run.program, "all-gather") if array[0] != "f32"]


def test_moments_in_pinned_host_memory():
    shapes = {"kernel": (64, 512)}
    tx = adamfn.adamw(1e-2, moments="8bit")
    on_device, on_host = (
        state_shardings(tx, params_of(shapes), REPLICATED, "data", memory_kind=kind)
        for kind in (None, "pinned_host")
    )

    def step(params, state, batch):
        return step_of(tx, weighted)(params, jax.device_put(state, on_device), batch)

    step = jax.jit(step, out_shardings=(REPLICATED, on_host))
    params = jax.device_put(params_of(shapes), REPLICATED)
    state = jax.jit(tx.init, out_shardings=on_host)(params)
    batches = [whole_numbers(number, shapes) for number in range(3)]
    for batch in batches:
        params, state = step(params, state, jax.device_put(batch, BATCH))
    for kept in (state[0].mu["kernel"], *jax.tree.leaves(state[0].scales)):
        assert kept.sharding.memory_kind == "pinned_host"
    assert state[0].count.sharding.memory_kind == "device"
    expected = Run(tx, weighted, batches[0], shapes).train(batches).params
    np.testing.assert_array_equal(params["kernel"], expected["kernel"])
