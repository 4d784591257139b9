"""Training on a mesh of eight: where the state is, what is sent, and that nothing changes."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import adamfn
from adamfn import formats
from adamfn.sharding import state_shardings

MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
REPLICATED = jax.NamedSharding(MESH, jax.P())
BATCH = jax.NamedSharding(MESH, jax.P("data"))
SHAPES = {"kernel": (64, 256), "wide": (96, 384), "out": (256, 10), "bias": (256,)}
STEPS, EXAMPLES = 20, 64


def params_of(shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def whole_numbers(step, shapes):
    """A batch for `weighted`: small whole numbers, whose sums are exact in any order."""
    random = np.random.default_rng(step)
    return {
        name: [
            random.integers(-3, 4, (EXAMPLES, *(n if len(shape) > 1 else 1 for n in shape[:1]))),
            random.integers(-3, 4, (EXAMPLES, shape[-1])),
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
    return jnp.mean((hidden @ params["out"] - y) ** 2) + jnp.mean(params["wide"] ** 2)


def examples(step, shapes=SHAPES):
    random = np.random.default_rng(step)
    x, y = random.normal(size=(EXAMPLES, 64)), random.normal(size=(EXAMPLES, 10))
    return x.astype(np.float32), y.astype(np.float32)


def step_of(tx, loss):
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return adamfn.apply_updates(params, updates), state

    return step


def train(tx, loss, batches, shapes=SHAPES, shardings=None):
    """Parameters and state after the batches; on one device without shardings."""
    params, step = params_of(shapes), jax.jit(step_of(tx, loss))
    if shardings is None:
        state = tx.init(params)
    else:
        params = jax.device_put(params, REPLICATED)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        step = jax.jit(
            step_of(tx, loss), out_shardings=(REPLICATED, shardings), donate_argnums=(0, 1)
        )
    for batch in batches:
        batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)
        params, state = step(params, state, jax.device_put(batch, BATCH) if shardings else batch)
    return params, state


def zero(tx, shapes=SHAPES, **options):
    return state_shardings(tx, params_of(shapes), REPLICATED, zero_axis="data", **options)


def bytes_on(device, tree):
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


def arrays_in(program, operation):
    """The types of what an operation of a compiled program returns, such as `f32[64,256]`."""
    lines = re.findall(rf"= (.*?) {operation}(?:-start)?\(", program)
    return sorted(kind for line in lines for kind in re.findall(r"\w+\[[\d,]*\]", line))


def compiled(tx, loss, batch, shapes=SHAPES):
    shardings = zero(tx, shapes)
    step = jax.jit(
        step_of(tx, loss),
        in_shardings=(REPLICATED, shardings, BATCH),
        out_shardings=(REPLICATED, shardings),
    )
    params = jax.eval_shape(lambda: params_of(shapes))
    state = jax.eval_shape(tx.init, params)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), batch)
    return step.lower(params, state, batch).compile().as_text()


@pytest.mark.parametrize("moments", formats.FORMATS)
def test_twenty_steps_equal_one_devices(moments):
    # The gradients are the same to the bit, so what could differ is the state's alone. `odd` is
    # divided only along the axis of the blocks, and within them.
    shapes = {**SHAPES, "odd": (99, 1024)}
    tx = adamfn.adamw(1e-2, moments=moments)
    batches = [whole_numbers(step, shapes) for step in range(STEPS)]
    alone, state_alone = train(tx, weighted, batches, shapes)
    params, state = train(tx, weighted, batches, shapes, zero(tx, shapes))
    for name in shapes:
        np.testing.assert_allclose(params[name], alone[name], rtol=0, atol=1e-6)
    for ours, one in zip(jax.tree.leaves(state), jax.tree.leaves(state_alone), strict=True):
        if ours.dtype.itemsize == 1 or ours.dtype == jnp.bfloat16:  # a flipped code is a bug
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(one))


def test_an_ordinary_loss_in_float32_too():
    tx = adamfn.adamw(1e-3)
    batches = [examples(step) for step in range(STEPS)]
    alone, _ = train(tx, network, batches)
    params, _ = train(tx, network, batches, shardings=zero(tx))
    for name in SHAPES:
        np.testing.assert_allclose(params[name], alone[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("moments", formats.FORMATS)
def test_an_eighth_of_the_state_lies_on_each_device(moments):
    tx = adamfn.adamw(1e-3, moments=moments)
    params = jax.eval_shape(lambda: params_of(SHAPES))
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, params)))
    init = jax.jit(tx.init, out_shardings=zero(tx)).lower(params).compile()
    memory = init.memory_analysis()  # of one device
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes <= 0.15 * whole
    state = (
        init(params_of(SHAPES))
        if False
        else jax.jit(tx.init, out_shardings=zero(tx))(jax.device_put(params_of(SHAPES), REPLICATED))
    )
    for device in jax.devices():
        assert bytes_on(device, state) <= 0.14 * whole
    assert bytes_on(jax.devices()[0], tx.init(params_of(SHAPES))) == whole


@pytest.mark.parametrize("moments", formats.FORMATS)
def test_no_moment_is_gathered(moments):
    program = compiled(adamfn.adamw(1e-3, moments=moments), network, examples(0))
    updates = sorted(f"f32[{','.join(map(str, shape))}]" for shape in SHAPES.values())
    assert arrays_in(program, "all-gather") == updates  # once each, and nothing else
    assert not arrays_in(program, "all-to-all")
    assert not arrays_in(program, "collective-permute")


def test_no_code_is_gathered_where_shards_cut_blocks():
    shapes = {"odd": (99, 1024)}  # 128 columns to a device, 256 to a block
    program = compiled(
        adamfn.adamw(1e-3, moments="8bit"), weighted, whole_numbers(0, shapes), shapes
    )
    gathered = arrays_in(program, "all-gather")
    assert gathered.count("f32[99,1024]") == 1  # the update
    assert not [kind for kind in gathered if kind.startswith(("s8", "u8"))]
    assert sum(math.prod(map(int, re.findall(r"\d+", k.split("[")[1]))) for k in gathered) < (
        99 * 1024 + 3 * 99 * 4 + 1  # and the scales
    )


def test_the_whole_step_keeps_its_shardings_and_devices_agree():
    tx = adamfn.adamw(1e-3, moments="8bit")
    shardings = zero(tx)
    params, state = train(tx, network, [examples(0)], shardings=shardings)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    for leaf in jax.tree.leaves(params):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == 8
        assert all(np.array_equal(copy, copies[0]) for copy in copies)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("moments", ["float32", "bfloat16", "8bit"])
def test_a_bad_shard_leaves_everything_as_it_was(moments, bad):
    tx = optax.apply_if_finite(adamfn.adamw(1e-2, moments=moments), max_consecutive_errors=5)
    shardings = zero(tx)
    good, poisoned = examples(0), examples(1)
    poisoned[0][3 * EXAMPLES // 8] = bad  # an example of the fourth device's alone
    params, state = train(tx, network, [good], shardings=shardings)
    after, then = train(tx, network, [good, poisoned], shardings=shardings)
    assert int(state.total_notfinite) == 0
    assert int(then.total_notfinite) == 1
    before = jax.tree.leaves((params, state.inner_state))
    for old, new in zip(before, jax.tree.leaves((after, then.inner_state)), strict=True):
        for a, b in zip(old.addressable_shards, new.addressable_shards, strict=True):
            assert a.device == b.device
            np.testing.assert_array_equal(np.asarray(a.data), np.asarray(b.data))
    # and the next good batch moves them again
    moved, last = train(tx, network, [good, poisoned, examples(2)], shardings=shardings)
    assert np.all(np.isfinite(moved["kernel"]))
    assert not np.array_equal(moved["kernel"], after["kernel"])
    assert int(last.inner_state[0].count) == 2


def test_data_and_tensor_axes_together():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    shapes = {"kernel": (64, 512), "out": (512, 256), "norm": (512,)}
    specs = {"kernel": jax.P(None, "model"), "out": jax.P("model"), "norm": jax.P()}
    split = {name: jax.NamedSharding(mesh, spec) for name, spec in specs.items()}
    batches = [whole_numbers(step, shapes) for step in range(3)]
    for moments in ("float32", "8bit", "4bit"):
        tx = adamfn.adamw(1e-2, moments=moments)
        shardings = state_shardings(tx, params_of(shapes), split, zero_axis="data")
        alone, _ = train(tx, weighted, batches, shapes)
        params = jax.device_put(params_of(shapes), split)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        step = jax.jit(step_of(tx, weighted), out_shardings=(split, shardings))
        for batch in batches:
            batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)
            params, state = step(
                params, state, jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
            )
        for name in shapes:
            np.testing.assert_allclose(params[name], alone[name], rtol=0, atol=1e-6)
        codes = jax.tree.leaves(state[0].nu["kernel"])[0]
        assert codes.addressable_shards[0].data.shape == (16, 256)


def test_moments_in_pinned_host_memory():
    tx = adamfn.adamw(1e-2, moments="8bit")
    on_host, on_device = zero(tx, memory_kind="pinned_host"), zero(tx)
    batches = [whole_numbers(step, SHAPES) for step in range(3)]
    expected, _ = train(tx, weighted, batches, shardings=on_device)

    def step(params, state, batch):
        params, state = step_of(tx, weighted)(params, jax.device_put(state, on_device), batch)
        return params, state

    params = jax.device_put(params_of(SHAPES), REPLICATED)
    state = jax.jit(tx.init, out_shardings=on_host)(params)
    step = jax.jit(step, out_shardings=(REPLICATED, on_host))
    for batch in batches:
        batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)
        params, state = step(params, state, jax.device_put(batch, BATCH))
    assert state[0].mu["kernel"].codes.sharding.memory_kind == "pinned_host"
    assert state[0].count.sharding.memory_kind == "device"
    jax.tree.map(np.testing.assert_array_equal, params, expected)
