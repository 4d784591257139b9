# SPDX-License-Identifier: Apache-2.0
"""Flax's classes with `adamfn.step` inside, beside flax's own."""

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state
from flax_networks import (
    STEPS,
    TRANSFORMATIONS,
    Network,
    linen_state,
    linen_step,
    loss_of,
    train_step,
)

import adamfn
from adamfn.interop.flax import Optimizer, TrainState

# Roundings of float32, which training pulls apart; in 8 bits one can turn a code to its neighbour.
TOLERANCE = dict.fromkeys(TRANSFORMATIONS, 1e-5) | {"8bit": 1e-4}
OF_A_LOSS = 5e-7  # four roundings of the first loss, which is 1: later ones are sums that cancel


def arrays(tree):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(tree)))


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# Curves

JITTED = [("jit", name) for name in ("adamw", "8bit", "clipped", "MultiSteps")]
EAGER = [("eager", "adamw")]
COUNTS = {"jit": STEPS, "eager": 4}


@pytest.mark.parametrize(("how", "name"), JITTED + EAGER)
def test_nnx_curves_are_flaxs(how, name):
    losses, steps = [], []
    count = COUNTS[how]
    for cls in (Optimizer, nnx.Optimizer):
        model = Network()
        optimizer = cls(model, TRANSFORMATIONS[name](), wrt=nnx.Param)
        step = nnx.jit(train_step) if how == "jit" else train_step
        losses.append([float(step(model, optimizer)) for _ in range(count)])
        steps.append(int(optimizer.step[...]))
    assert losses[0][-1] < (0.9 if how == "jit" else 1) * losses[0][0]
    np.testing.assert_allclose(*losses, rtol=TOLERANCE[name], atol=OF_A_LOSS)
    assert steps == [count, count]


@pytest.mark.parametrize(("how", "name"), [*JITTED[:3], *EAGER])
def test_linen_curves_are_flaxs(how, name):
    losses = []
    for cls in (TrainState, train_state.TrainState):
        state = linen_state(cls, TRANSFORMATIONS[name]())
        step = jax.jit(linen_step) if how == "jit" else linen_step
        losses.append([])
        for _ in range(COUNTS[how]):
            state, loss = step(state)
            losses[-1].append(float(loss))
        assert type(state) is cls
        assert state.step == COUNTS[how]
    assert losses[0][-1] < (0.9 if how == "jit" else 1) * losses[0][0]
    np.testing.assert_allclose(*losses, rtol=TOLERANCE[name], atol=OF_A_LOSS)


@pytest.mark.parametrize("graph", [True, False])
def test_models_as_graphs_and_as_trees(graph):
    model, same = Network(), Network()
    optimizer = Optimizer(model, adamfn.adamw(3e-3), wrt=nnx.Param, graph=graph)
    theirs = nnx.Optimizer(same, adamfn.adamw(3e-3), wrt=nnx.Param, graph=graph)
    found = [float(train_step(model, optimizer)) for _ in range(5)]
    expected = [float(train_step(same, theirs)) for _ in range(5)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# What flax's can do


def test_a_copy_goes_its_own_way():
    model = Network()
    optimizer = Optimizer(model, adamfn.adamw(3e-3, moments="8bit"), wrt=nnx.Param)
    train_step(model, optimizer)
    other_model, other = copy.deepcopy((model, optimizer))
    assert optimizer.opt_state[0].mu["inner"]["kernel"].dtype == jnp.int8
    before = arrays(optimizer)
    expected = float(train_step(other_model, other))
    assert_equal(arrays(optimizer), before)
    assert float(train_step(model, optimizer)) == expected
    assert_equal(arrays((model, optimizer)), arrays((other_model, other)))


@pytest.mark.parametrize("grads_of", ["wrt", "all parameters"])
def test_what_is_not_wrt_stays(grads_of):
    wrt = nnx.All(nnx.Param, nnx.PathContains("out"))
    model = Network()
    optimizer = Optimizer(model, adamfn.adamw(3e-3), wrt=wrt)
    before = arrays(model)
    nnx.jit(functools.partial(train_step, wrt=wrt if grads_of == "wrt" else nnx.Param))(
        model, optimizer
    )
    after = arrays(model)
    for layer in ("hidden", "inner"):
        assert_equal(after[layer], before[layer])
    assert np.all(after["out"]["kernel"] != before["out"]["kernel"])
    assert set(nnx.to_pure_dict(nnx.state(optimizer))["opt_state"][0]["mu"]) == {"out"}


@pytest.mark.parametrize("rate", [0.5, jnp.float32(0.5), nnx.Variable(jnp.float32(0.5))])
def test_a_rate_of_the_step(rate):
    model = Network()
    optimizer = Optimizer(model, adamfn.adam(3e-3), wrt=nnx.Param)
    before = arrays(model)["out"]["bias"]
    train_step(model, optimizer, learning_rate=rate)
    np.testing.assert_allclose(abs(arrays(model)["out"]["bias"] - before), 0.5, rtol=1e-3)
    assert optimizer.opt_state[-1].learning_rate[...] == 0.5


def test_updates_are_returned_when_asked_for():
    model, same = Network(), Network()
    optimizer = Optimizer(model, adamfn.adamw(3e-3), wrt=nnx.Param)
    theirs = nnx.Optimizer(same, adamfn.adamw(3e-3), wrt=nnx.Param)
    grads = nnx.grad(loss_of)(model)
    expected = theirs.update(same, grads)
    found = optimizer.update(model, grads, return_updates=True)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected)
    assert optimizer.update(model, grads) is None


@pytest.mark.parametrize("name", ["8bit", "MultiSteps"])
def test_nnx_goes_on_from_orbaxs_checkpoint(name, tmp_path):
    def start():
        model = Network()
        return model, Optimizer(model, TRANSFORMATIONS[name](), wrt=nnx.Param)

    model, optimizer = start()
    step = nnx.jit(train_step)
    for _ in range(3):
        step(model, optimizer)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", nnx.state((model, optimizer)))
        checkpointer.wait_until_finished()
        restored = start()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.state(restored))
        nnx.update(restored, checkpointer.restore(tmp_path / "run", like))
    for _ in range(3):
        assert step(model, optimizer) == step(*restored)
    assert_equal(arrays((model, optimizer)), arrays(restored))


@pytest.mark.parametrize("name", ["adamw", "8bit", "clipped", "MultiSteps"])
def test_a_train_state_goes_on_from_its_bytes(name):
    step = jax.jit(linen_step)
    state = linen_state(TrainState, TRANSFORMATIONS[name]())
    for _ in range(3):
        state, _ = step(state)
    written = serialization.to_bytes(state)
    restored = serialization.from_bytes(linen_state(TrainState, state.tx), written)
    assert jax.tree.structure(restored.opt_state) == jax.tree.structure(state.opt_state)
    for _ in range(3):
        (state, loss), (restored, same) = step(state), step(restored)
        assert loss == same
    assert_equal(restored.params, state.params)
    assert_equal(restored.opt_state, state.opt_state)


def test_flaxs_checkpoint_is_ours():
    # The same fields, so a run of flax's own class goes on in this one.
    theirs, _ = linen_step(linen_state(train_state.TrainState, adamfn.adamw(3e-3)))
    blank = linen_state(TrainState, theirs.tx)
    ours = serialization.from_bytes(blank, serialization.to_bytes(theirs))
    (theirs, _), (ours, _) = linen_step(theirs), linen_step(ours)
    agree = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8)
    jax.tree.map(agree, ours.params, theirs.params)


class WithStatistics(TrainState):
    statistics: jax.Array
    value: jax.Array | None = None


def test_fields_are_replaced_and_the_rest_goes_to_the_transformation():
    state = linen_state(WithStatistics, adamfn.adam(3e-3), statistics=jnp.zeros(2))
    moved, _ = linen_step(state, statistics=jnp.ones(2), learning_rate=0.5, value=jnp.ones(()))
    assert moved.statistics.tolist() == [1, 1]
    assert moved.value == 1  # a field, though transformations take an argument of that name
    assert moved.opt_state[-1].learning_rate == 0.5
    with pytest.raises(TypeError, match="step: found the argument statistic="):
        linen_step(state, statistic=jnp.ones(2))


@pytest.mark.parametrize("cls", [TrainState, train_state.TrainState])
def test_fp8_statistics_are_overwritten(cls):
    params = {"params": {"w": jnp.ones(3)}, OVERWRITE_WITH_GRADIENT: {"scale": jnp.ones(1)}}
    grads = {"params": {"w": jnp.ones(3)}, OVERWRITE_WITH_GRADIENT: {"scale": jnp.full(1, 7.0)}}
    state = cls.create(apply_fn=None, params=params, tx=adamfn.adam(0.25))
    state = state.apply_gradients(grads=grads)
    assert state.params[OVERWRITE_WITH_GRADIENT]["scale"] == 7
    np.testing.assert_allclose(state.params["params"]["w"], 0.75, rtol=1e-6)
    assert set(state.opt_state[0].mu) == {"w"}


@pytest.mark.parametrize("params", [jnp.ones(3), (jnp.ones(3), jnp.ones(()))])
def test_parameters_need_not_be_a_dictionary(params):
    state = TrainState(0, None, params, tx := adamfn.adam(0.25), tx.init(params))
    state = state.apply_gradients(grads=params)
    jax.tree.map(lambda p: np.testing.assert_allclose(p, 0.75, rtol=1e-6), state.params)


def test_the_guide_on_eight_devices():
    # Elsewhere its examples run on one.
    guide = Path(__file__).parent.parent / "docs" / "many_devices.md"
    quick = "--xla_backend_optimization_level=0"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {quick} --xla_force_host_platform_device_count=8"
    code = (
        "import pathlib, sys, jax; from website import samples; assert len(jax.devices()) == 8;"
        "samples.run(pathlib.Path(sys.argv[1]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(guide)],
        cwd=guide.parent.parent,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


# Errors


@pytest.fixture
def pair():
    model = Network()
    return model, Optimizer(model, adamfn.adamw(3e-3), wrt=nnx.Param)


def test_forgotten_gradients(pair):
    model, optimizer = pair
    with pytest.raises(TypeError, match=r"update\(\) missing 1 required .* argument: 'grads'"):
        optimizer.update(model)
    with pytest.raises(TypeError, match=r"apply_gradients.* missing .* 'grads'"):
        linen_state(TrainState, adamfn.adam()).apply_gradients()


def test_gradients_before_the_model(pair):
    model, optimizer = pair
    with pytest.raises(TypeError, match=r"gradients first; expected update\(model, grads\)"):
        optimizer.update(nnx.grad(loss_of)(model), model)


@pytest.mark.parametrize(
    ("wrt", "path"),
    [
        (nnx.All(nnx.Param, nnx.PathContains("out")), "hidden/bias"),
        (nnx.BatchStat, "hidden/bias"),
        (nnx.Not(nnx.PathContains("kernel")), "hidden/kernel"),
    ],
)
def test_gradients_of_another_wrt(pair, wrt, path):
    model, optimizer = pair
    grads = nnx.grad(loss_of, argnums=nnx.DiffState(0, wrt))(model)
    before = arrays(pair)
    with pytest.raises(ValueError, match=rf"found no gradient of {path}; .*wrt=<class .*Param'>"):
        optimizer.update(model, grads)
    assert_equal(arrays(pair), before)


def test_gradients_of_another_model(pair):
    model, optimizer = pair
    with pytest.raises(ValueError, match=r"differ at \['hidden'\]\['bias'\]"):
        optimizer.update(model, nnx.grad(loss_of)(Network(32)))
    state = linen_state(TrainState, adamfn.adamw())
    with pytest.raises(ValueError, match=r"differ at \['Dense_0'\]\['bias'\]"):
        state.apply_gradients(grads={"Dense_1": state.params["Dense_1"]})


def test_an_argument_that_nothing_takes(pair):
    model, optimizer = pair
    with pytest.raises(TypeError, match=r"found the argument lr=0.1, .*expected learning_rate="):
        train_step(model, optimizer, lr=0.1)


def test_flax_is_imported_by_whoever_wants_it():
    code = (
        "import sys, adamfn, adamfn.interop; assert 'flax' not in sys.modules;"
        "sys.modules['flax'] = None; import adamfn.interop.flax"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert ran.stderr.splitlines()[-1].startswith("ModuleNotFoundError: import of flax halted")
