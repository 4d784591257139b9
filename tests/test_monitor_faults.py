# SPDX-License-Identifier: Apache-2.0
"""The monitor finds the faults that are there, finds none elsewhere, and shows them."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamfn
from adamfn import monitor

WIDTH, HIDDEN, EXAMPLES = 16, 128, 256
ADAM = adamfn.adam()  # its rate is given to each step: compiled once for all runs that share it
BITS = jnp.bfloat16


def network(params, batch):
    x, y = batch
    for name in ("first", "second"):
        layer = params[name]
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"]) * layer.get("scale", 1)
    return jnp.mean((x @ params["out"] - y) ** 2)


def new_network(dtype=jnp.float32):
    random = np.random.default_rng(0)

    def dense(inputs, outputs):
        return jnp.asarray(random.normal(size=(inputs, outputs)) / inputs**0.5, dtype)

    return {
        "first": {"kernel": dense(WIDTH, HIDDEN), "bias": jnp.zeros(HIDDEN, dtype)},
        "second": {"kernel": dense(HIDDEN, HIDDEN), "bias": jnp.zeros(HIDDEN, dtype)},
        "out": dense(HIDDEN, 4),
    }


@functools.partial(jax.jit, static_argnames="loss")
def gradients(params, number, loss):
    kx, ky = jax.random.split(jax.random.fold_in(jax.random.key(0), number))
    x = jax.random.normal(kx, (EXAMPLES, WIDTH))
    y = jnp.sin(x[:, :4]) + 0.1 * jax.random.normal(ky, (EXAMPLES, 4))
    return jax.grad(loss)(params, (x, y))


@functools.partial(jax.jit, static_argnames=("tx", "ours"))
def seen_and_moved(tx, grads, state, params, ours, rate):
    seen = monitor.observe(tx, grads, state, params, ours=ours, learning_rate=rate)
    updates, state = tx.update(grads, state, params, learning_rate=rate)
    return seen, adamfn.apply_updates(params, updates), state


def train(tx, params, loss=network, steps=12, poison=None, ours=None, rate=1e-2):
    """A short training run, and what was seen of every step."""
    state, run = tx.init(params), []
    for number in range(steps):
        grads = gradients(params, number, loss)
        grads = grads if poison is None else poison(grads)
        seen, params, state = seen_and_moved(tx, grads, state, params, ours, rate)
        run.append(seen)
    return run


def found_in(run):
    return [(fault.layer, fault.word) for fault in monitor.faults(run)]


@pytest.mark.parametrize(
    ("tx", "dtype"), [(ADAM, jnp.float32), (adamfn.adamw(moments="8bit"), BITS)]
)
def test_nothing_is_reported_of_a_healthy_network(tx, dtype):
    run = train(tx, new_network(dtype), steps=30)
    for seen in run:
        assert found_in(seen) == []


def test_a_dead_layer_is_found():
    def loss(params, batch):
        return network(params | {"second": params["second"] | {"scale": 0.0}}, batch)

    # Nothing comes through `second`: what stands around it has no gradient either.
    found = found_in(train(ADAM, new_network(), loss))
    assert {word for _, word in found} == {"dead"}
    assert {"second/kernel", "second/bias"} <= {layer for layer, _ in found}


def test_one_dead_layer_of_a_healthy_network_is_found():
    def loss(params, batch):  # a bias so low that no unit of a ReLU ever fires
        x, _ = batch
        dead = jax.nn.relu(x @ params["side"] - 1e3).sum(-1, keepdims=True)
        return network(params, (x + dead, batch[1]))

    params = new_network() | {"side": jnp.ones((WIDTH, 8)) / 8}
    assert found_in(train(ADAM, params, loss)) == [("side", "dead")]


def test_exploding_gradients_are_found():
    def poison(grads):
        kernel = 1e4 * grads["second"]["kernel"]
        return grads | {"second": grads["second"] | {"kernel": kernel}}

    run = train(ADAM, new_network(), poison=poison)
    assert found_in(run) == [("second/kernel", "exploding")]


def test_steps_that_eps_decides_are_found():
    def poison(grads):
        return grads | {"out": 1e-6 * grads["out"]}

    large = adamfn.adam(eps=1e-4)
    run = train(large, new_network(), poison=poison)
    assert found_in(run) == [("out", "decided by eps")]
    tiny = jax.tree.map(lambda p: 1e-2 * p, new_network())
    run = train(large, tiny, lambda p, batch: 1e-3 * network(p, batch), rate=1e-5)
    assert {word for _, word in found_in(run)} == {"decided by eps"}


def test_updates_that_rounding_loses_are_found():
    run = train(ADAM, new_network() | {"out": new_network(BITS)["out"]}, rate=1e-6)
    assert found_in(run) == [("out", "stalled by rounding")]
    # A thousand times the rate, and they arrive.
    run = train(ADAM, new_network() | {"out": new_network(BITS)["out"]})
    assert found_in(run) == []


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_one_element_that_is_not_finite_is_found(bad):
    def poison(grads):
        bias = grads["second"]["bias"].at[5].set(bad)
        return grads | {"second": grads["second"] | {"bias": bias}}

    run = train(ADAM, new_network(), poison=poison, steps=1)
    assert found_in(run) == [("second/bias", "not finite")]
    assert run[0].leaves["second/bias"]["not_finite_gradient"] == 1
    assert run[0].leaves["second/bias"]["not_finite_moments"] >= 1


def test_a_weight_that_is_not_finite_comes_before_what_it_spoils():
    params = new_network()
    params["first"]["kernel"] = params["first"]["kernel"].at[3, 4].set(jnp.nan)
    found = found_in(train(ADAM, params, steps=1))
    assert found[0] == ("first/kernel", "not finite")
    assert len(found) == 5  # the loss is NaN, and so is every gradient


def test_codes_at_their_limit_are_found():
    def loss(params, batch):  # most of a block's gradients are 1e-9 of the others
        unit = jnp.where(jnp.arange(HIDDEN) % 8 == 0, 1.0, 1e-9)
        return network(params | {"second": params["second"] | {"scale": unit}}, batch)

    tx = adamfn.adam(eps=1e-30, moments="4bit")
    params = new_network() | {"out": 10 * new_network()["out"]}
    found = found_in(train(tx, params, loss, rate=1e-3))
    assert found == [("second/kernel", "codes at their limit")]


def test_a_frozen_leaf_is_found():
    labels = {"first": "train", "second": "train", "out": "freeze"}
    frozen = optax.partition({"train": ADAM, "freeze": optax.set_to_zero()}, labels)
    assert found_in(train(frozen, new_network(), ours=ADAM)) == [("out", "frozen")]
    # At a rate of zero nothing moves, and nothing is wrong.
    assert found_in(train(ADAM, new_network(), rate=0.0)) == []


def test_one_layer_of_a_stack_is_named():
    params = {"blocks": jnp.ones((3, 4, 4)), "x": jnp.ones(2), "y": jnp.ones(2)}
    grads = {**params, "blocks": params["blocks"].at[1].set(0)}
    tx = adamfn.adam()
    seen = monitor.observe(tx, grads, tx.init(params), params, layers={"blocks": 0})
    assert found_in(seen) == [("blocks[1]", "dead")]


def test_it_goes_through_scan_and_shows():
    tx = adamfn.adamw(1e-2)
    params = new_network()
    random = np.random.default_rng(0)
    batches = [random.normal(size=(20, 64, n)).astype(np.float32) for n in (WIDTH, 4)]

    @jax.jit
    def steps(params, batches):
        def step(carry, batch):
            params, state = carry
            loss, grads = jax.value_and_grad(network)(params, batch)
            seen = monitor.observe(tx, grads, state, params, every=5)
            updates, state = tx.update(grads, state, params)
            return (adamfn.apply_updates(params, updates), state), (loss, seen)

        return jax.lax.scan(step, (params, tx.init(params)), batches)[1]

    losses, seen = steps(params, batches)
    assert [step for step, _ in monitor.looks(seen)] == [1, 6, 11, 16]
    assert [step for step, _ in monitor.looks([seen, seen])] == 2 * [1, 6, 11, 16]
    flat = monitor.flat(seen)
    assert flat["first/kernel/rate"] == pytest.approx(1e-2)
    assert all(type(x) is float for x in flat.values())
    table = monitor.report(seen, rows=3)
    assert table.row_count == 3
    assert table.title == "step 16: nothing is wrong"
    for figure in ("gradient", "agreement", "lost"):
        if figure == "lost":
            with pytest.raises(
                ValueError, match=r"found no figure 'lost'; expected one of agreement, "
            ):
                monitor.picture(seen, figure=figure)
            continue
        drawn = monitor.picture(seen, losses.tolist(), figure)
        above, below = drawn.axes[:2]
        assert above.lines[0].get_ydata().tolist() == losses.tolist()
        shown = below.collections[0].get_array()
        name = below.get_yticklabels()[1].get_text()
        row = [layers[name][figure] for _, layers in monitor.looks(seen)]
        np.testing.assert_allclose(np.asarray(shown)[1], row, rtol=1e-6)


def test_the_worst_layer_is_the_tables_first_row():
    from rich.console import Console

    def poison(grads):
        return grads | {"out": grads["out"].at[0, 0].set(jnp.nan)}

    run = train(ADAM, new_network(), poison=poison, steps=1)
    console = Console(width=80, file=io.StringIO())
    console.print(monitor.report(run))
    title, *lines = console.file.getvalue().splitlines()
    assert title.strip() == "step 1: 1 of 5 layers"
    rows = [line.split()[:3] for line in lines if line.strip()]
    first = next(row for row in rows if row[0] in ("out", "first/kernel", "second/bias"))
    assert first == ["out", "not", "finite"]
    drawn = monitor.picture(run, figure="gradient")
    mesh = drawn.axes[1].collections[0]
    assert (mesh.get_array() > mesh.norm.vmax).sum() == 1  # the one that is red
