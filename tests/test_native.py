# SPDX-License-Identifier: Apache-2.0
"""Native code of Adam's program: its numbers, beside XLA's, and what it refuses."""

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import call_of

import adamfn
from adamfn.backends.cpu import loader, lowering
from adamfn.backends.primitive import bind_primitive as bind
from adamfn.backends.xla import run_call
from adamfn.formats import EightBit, get
from adamfn.formats.format import answer

MOMENTS = ("float32", "bfloat16", "8bit")


def test_native_code_runs_here():
    # Every other test of this page would pass by XLA alone.
    assert loader.native().reason is None
    assert adamfn.backend("cpu").name == "native"
    assert str(adamfn.backend("cpu")).startswith("native on cpu: compiled for ")
    with pytest.raises(ValueError, match="platform is 'abacus'; expected one of cpu, gpu"):
        adamfn.backend("abacus")
    text = jax.jit(lambda p, s: adamfn.step(TX, p, s, p)).lower(PARAMS, STATE).as_text()
    assert "adamfn_step" in text


TX = adamfn.adam()
PARAMS = {"w": jnp.ones(3)}
STATE = TX.init(PARAMS)


def special_leaf(seed, size):
    """Normal numbers, and every kind of other: denormals, zeros, infinities, NaN, the largest."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(size).astype(np.float32) * 10.0 ** rng.integers(-12, 3, size)
    odd = [0.0, -0.0, 1e-42, -1e-40, 1.2e-38, 3e38, np.inf, -np.inf, np.nan, 1e-20, 1e-19]
    x[:: size // 100] = rng.choice(odd, x[:: size // 100].shape)
    return jnp.asarray(x, jnp.float32)


def adamw(**arguments):
    return adamfn.adamw(0.1, seed=3, **arguments)


def cautious(**arguments):
    return adamfn.chain(
        adamfn.scale_by_moments(**arguments),
        adamfn.bias_correct(),
        adamfn.add_decayed_weights(0.1, cautious=True),
        adamfn.scale_by_lr(0.1),
    )


def atan2(**arguments):
    return adamfn.chain(
        adamfn.scale_by_atan2_moments(**arguments),
        adamfn.add_decayed_weights(0.1),
        adamfn.scale_by_lr(0.1),
    )


@pytest.mark.parametrize(
    ("make", "moments"),
    [
        *((adamw, moments) for moments in MOMENTS),
        (partial(adamw, eps=0.0), "float32"),
        (partial(adamw, eps=0.0), "8bit"),
        (cautious, "8bit"),
        (atan2, "bfloat16"),
    ],
)
def test_the_same_numbers_as_xla_whatever_they_are(moments, make):
    params = {"w": special_leaf(0, 64 * 300).reshape(64, 300), "b": special_leaf(1, 1001)}
    found, expected = (
        adamfn.with_backend(make(moments=moments), backend) for backend in ("auto", "xla")
    )
    states = [tx.init(params) for tx in (found, expected)]
    steps = [jax.jit(lambda p, s, g, tx=tx: adamfn.step(tx, g, s, p)) for tx in (found, expected)]
    trees = [params, params]
    for seed in (2, 4):
        grads = {"w": special_leaf(seed, 64 * 300).reshape(64, 300), "b": special_leaf(seed, 1001)}
        for i, step in enumerate(steps):
            trees[i], states[i] = step(trees[i], states[i], grads)
    for a, b in zip(
        *(jax.tree.leaves((t, s)) for t, s in zip(trees, states, strict=False)), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype.kind in "iu" or a.dtype.itemsize < 4:
            # Sums that were rounded otherwise may fall on another side of their noise.
            assert np.mean(np.float32(a) != np.float32(b)) < 5e-3
        else:
            # A fused multiply-add cancels otherwise, at most by a rounding of what is subtracted.
            np.testing.assert_allclose(a, b, rtol=5e-6, atol=3e-8)


@pytest.mark.parametrize(
    ("way", "moments"), [("step", "float32"), ("step", "8bit"), ("update", "bfloat16")]
)
def test_clipped_and_held_back_as_by_xla(moments, way):
    tx = adamfn.chain(
        adamfn.skip_outliers(["grad_norm"], window=20),
        adamfn.clip_by_global_norm(30.0),
        cautious(moments=moments),
    )
    params = jnp.asarray(np.random.default_rng(0).standard_normal((64, 300)), jnp.float32)
    states = []
    for backend in ("auto", "xla"):
        own = adamfn.with_backend(tx, backend)

        def body(carry, scale, own=own):
            p, state = carry
            g = jnp.sin(p * 7) * scale
            if way == "step":
                p, state = adamfn.step(own, g, state, p)
            else:
                updates, state = own.update(g, state, p)
                p = adamfn.apply_updates(p, updates)
            return (p, state), None

        run = jax.jit(lambda carry, scales, body=body: jax.lax.scan(body, carry, scales)[0])
        scales = np.ones(24, np.float32)
        scales[21:23] = 50.0, np.nan
        operands = (params, tx.init(params)), scales
        lowered = run.lower(*operands)
        assert ("adamfn_step" in lowered.as_text()) == (
            backend == "auto" and (way == "step" or moments != "float32")
        )
        states.append(lowered.compile()(*operands))
    (found, state), (expected, _) = states
    assert state[0].skipped == 2
    distance = np.linalg.norm(expected - params)
    assert (
        np.linalg.norm(found - expected)
        < {"float32": 1e-5, "bfloat16": 1e-2, "8bit": 3e-2}[moments] * distance
    )


def test_noise_and_codes_are_those_of_the_format():
    # One step from the same state: what differs is only the rounding of sums.
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.standard_normal((35, 413)), jnp.float32) for k in "ab"}
    for name in ("8bit", "bfloat16"):
        plain = adamfn.adam(moments=name)
        found, expected = (
            jax.jit(lambda state, tx=tx: tx.update(params, state)[1])
            for tx in (plain, adamfn.with_backend(plain, "xla"))
        )
        step = jax.jit(lambda state, tx=plain: adamfn.step(tx, params, state, params)[1])
        for count in (0, 1, 2**31 - 2):
            moments, *rest = plain.init(params)
            state = (moments._replace(count=jnp.int32(count)), *rest)
            whole = jax.tree.leaves(expected(state))
            for other in (found(state), step(state)):
                for a, b in zip(jax.tree.leaves(other), whole, strict=True):
                    assert np.mean(np.float32(a) != np.float32(b)) < 1e-4


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_are_native_where_that_is_faster(moments, dtype):
    rng = np.random.default_rng(0)
    g = jnp.asarray(rng.standard_normal((64, 300)), dtype)
    p = jnp.asarray(rng.standard_normal((64, 300)), jnp.float32)
    for make in (adamfn.adamw, partial(adamfn.adam, nesterov=True)):
        tx = make(0.1, moments=moments)
        lowered = jax.jit(tx.update).lower(g, tx.init(p), p)
        assert ("adamfn_step" in lowered.as_text()) == (moments != "float32")
        if moments == "float32":
            continue
        found, _ = lowered.compile()(g, tx.init(p), p)
        expected, _ = jax.jit(adamfn.with_backend(tx, "xla").update)(g, tx.init(p), p)
        assert found.dtype == expected.dtype == dtype
        # A rounding of the dtype, where the sums before fell on another side of it.
        tolerance = 1e-6 if dtype == "float32" else 2**-8
        np.testing.assert_allclose(np.float32(found), np.float32(expected), rtol=tolerance)


def test_parts_of_adam_are_native():
    x = jnp.ones(5000)
    moments = adamfn.scale_by_moments()
    for tx, native in (
        (moments, True),
        (adamfn.chain(moments, adamfn.bias_correct()), True),
        (adamfn.chain(moments, adamfn.scale_by_lr(0.1)), True),
        (adamfn.chain(moments, adamfn.add_decayed_weights(0.1)), True),
        (adamfn.chain(adamfn.scale_by_lr(0.1), moments), True),
        (adamfn.chain(adamfn.clip_by_global_norm(1.0), adamfn.adamw(0.1)), True),
        (adamfn.chain(moments, adamfn.add_decayed_weights(0.1, cautious=True)), True),
        (adamfn.chain(moments, adamfn.add_corrected_decay(0.1, 1e-3, 1e-3)), True),
        (adamfn.chain(adamfn.skip_outliers(["grad_norm"]), adamfn.adamw(0.1)), True),
        (adamfn.scale_by_atan2_moments(), True),
        (atan2(), True),
        (adamfn.chain(moments, moments), False),
        (adamfn.chain(moments, adamfn.cautious_updates()), True),
        (adamfn.chain(moments, adamfn.clip_updates()), True),
        (adamfn.chain(moments, adamfn.bias_correct(), adamfn.scale_by_lr(), moments), False),
        (adamfn.amsgrad(), False),
    ):
        lowered = jax.jit(partial(adamfn.step, tx)).lower(x, tx.init(x), x)
        assert ("adamfn_step" in lowered.as_text()) == native
        if not native:
            continue
        expected = jax.jit(partial(adamfn.step, adamfn.with_backend(tx, "xla")))(x, tx.init(x), x)
        found = lowered.compile()(x, tx.init(x), x)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), found, expected)


@pytest.mark.parametrize("block", [16, 64, 1024, 1040])
def test_block_sizes(block):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 2100)), jnp.float32)
    steps = []
    for backend in ("auto", "xla"):
        tx = adamfn.with_backend(adamfn.adam(moments=EightBit(block)), backend)
        lowered = jax.jit(lambda s, tx=tx: adamfn.step(tx, x, s, x)).lower(tx.init(x))
        native_call = "adamfn_step" in lowered.as_text()
        assert native_call == (backend == "auto" and block <= 1024)
        steps.append(lowered)
    if block > 1024:
        return
    moved = [lowered.compile()(tx.init(x))[1] for lowered in steps]
    for a, b in zip(*map(jax.tree.leaves, moved), strict=True):
        if (a.dtype.kind == "i" and a.dtype.itemsize == 1) or a.dtype == jnp.uint8:
            assert np.mean(a != b) < 1e-3  # as above
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5)


def native_call(operands, results, **attributes):
    assert loader.native().reason is None  # which registers it
    leaves = max(attributes.get("blocks", np.zeros(1)).size, 1)
    gradients = operands[-2 * leaves :][:leaves]
    attributes = {
        "axes": np.array([n for g in gradients for n in (1, g.size, 1)], np.int64),
        "format": np.int32(0),
        "bits": np.int32(0),
        "moves": True,
        "returns": False,
        "scalars": PLACES,
        "blocks": np.array([0], np.int64),
    } | attributes
    call = jax.ffi.ffi_call(loader.TARGET, results, vmap_method="sequential")
    return jax.block_until_ready(call(*operands, **attributes))


PLACES = np.array([0, 1, -1, -1, 2, 3, -1, 4, 5, 6, -1, 5, -1, -1, -1], np.int64)
"""Of seven scalars: 1 - b1, 1 - b2, eps, eps_root, the correction, the decay and minus the rate."""


def test_results_that_are_not_in_place():
    # XLA gives results their operands' buffers; native code does not rely on it.
    n = 5000
    rng = np.random.default_rng(0)
    g, p = (jnp.asarray(rng.standard_normal(n), jnp.float32) for _ in range(2))
    call, operands = call_of(adamfn.adamw(0.1, weight_decay=0.1), g, p)
    assert lowering.scalar_places(call.program) == PLACES.tolist()
    mu = operands.kept[0][0][0]
    found = native_call(jax.tree.leaves(operands), [mu, mu, p])
    expected = run_call(call, operands)
    in_place = jax.jit(partial(bind, call, "auto"))(operands)
    for a, b, c in zip(found, *map(jax.tree.leaves, (expected, in_place)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-8)
        np.testing.assert_array_equal(a, c)
    np.testing.assert_array_equal(mu, 0)


def wrong_calls():
    f32, ones = jnp.float32, jnp.ones
    good = [ones(7), jnp.int32(1), jnp.zeros((1, 2), jnp.uint32), *[ones(4)] * 4]

    def operand(index, value):
        operands = list(good)
        operands[index] = value
        return operands

    def blocks(*sizes):
        return {"blocks": np.array(sizes, np.int64)}

    yield "scalars' dtype", operand(0, ones(7, jnp.int32)), {}, "other scalars"
    yield "too few scalars", operand(0, ones(6)), {}, "other scalars"
    yield "places", good, {"scalars": PLACES[:9]}, "another number of scalars"
    yield "count", operand(1, f32(1)), {}, "other scalars"
    yield "indices", operand(2, jnp.zeros((2, 2), jnp.uint32)), {}, "other scalars"
    yield "mu's size", operand(3, ones(5)), {}, "moments of another dtype or size"
    yield "nu's dtype", operand(4, ones(4, jnp.int32)), {}, "moments of another dtype or size"
    yield "gradient's dtype", operand(5, ones(4, jnp.float16)), {}, "other dtypes or sizes"
    yield "gradient's size", operand(5, ones(3)), {}, "other dtypes or sizes"
    yield "too few", good[:-1], {}, "another number of operands"
    yield "two leaves", good, blocks(0, 0), "another number of operands"
    yield "no leaf", good, blocks(), "another number of leaves"
    yield "format", good, {"format": np.int32(9)}, "an unknown format"
    yield "negative format", good, {"format": np.int32(-1)}, "an unknown format"
    yield "bits", good, {"bits": np.int32(8)}, "another number of bits"
    yield "weights", good, {"bits": np.int32(16)}, "another dtype than bfloat16"
    lean = EightBit().encode(ones((2, 300)), ones((2, 300)), None)
    eight = [*good[:3], *jax.tree.leaves(lean), ones((2, 300)), ones((2, 300))]
    as_eight = {"format": np.int32(3)}
    yield "block", eight, as_eight, "block of another size"
    yield "wide", eight, as_eight | blocks(4096), "block of another size"
    for axes in ([], [2, 4, 1], [1, 5, 1], [-1], [1, -4, 1]):
        yield f"axes {axes}", good, {"axes": np.array(axes, np.int64)}, "other axes"
    yield "scales", eight, as_eight | blocks(32), "moments of another dtype or size"


@pytest.mark.parametrize(
    ("operands", "attributes", "message"),
    [pytest.param(*case, id=name) for name, *case in wrong_calls()],
)
def test_a_wrong_call_is_an_error_and_no_crash(operands, attributes, message):
    moments = 5 if attributes.get("format") == 3 else 2
    leaves = len(attributes.get("blocks", [0]))
    results = [*operands[3 : 3 + moments], *operands[3 + moments + leaves :]]
    with pytest.raises(Exception, match=message):
        native_call(operands, results, **attributes)


def test_threads_that_call_at_once():
    params = {"w": jnp.ones((400, 300)), "b": jnp.ones(7)}
    tx = adamfn.adam(0.1, moments="8bit")
    step = jax.jit(lambda p, s: adamfn.step(tx, p, s, p))

    def run(_):
        p, state = params, tx.init(params)
        for _ in range(10):
            p, state = step(p, state)
        return jax.block_until_ready((p, state))

    expected = run(0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(run, range(8)):
            jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_step_is_over_when_it_returns():
    # What reads the parameters next reads the last task's too.
    tx = adamfn.adam(0.25, b1=0.0, b2=0.0, eps=0.0)
    params = jnp.zeros(2**20)
    state = tx.init(params)

    @jax.jit
    def largest(state):
        moved, _ = adamfn.step(tx, jnp.ones_like(params), state, params)
        return jnp.max(moved)

    assert {float(largest(state)) for _ in range(100)} == {-0.25}


def test_a_step_is_dispatched_as_what_it_costs():
    # What XLA counts as cheap it runs in the calling thread, and a call of native code as nothing.
    tx = adamfn.adam(0.1)
    for size, takes_long in ((2**15 - 1, False), (2**15, True)):
        params = jnp.ones(size)
        step = jax.jit(partial(adamfn.step, tx)).lower(params, tx.init(params), params).compile()
        assert "adamfn_step" in step.as_text()
        assert (step.cost_analysis()["flops"] >= 1000) == takes_long


def test_a_process_forked_after_use():
    # XLA's own dispatch waits for its threads there, unless it is told to do without them.
    program = """
        import os, signal, warnings
        import jax, jax.numpy as jnp, numpy as np, adamfn
        warnings.simplefilter("ignore")  # JAX warns of forks
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        params, tx = jnp.ones(200_000), adamfn.adam(0.1)
        state = tx.init(params)
        step = jax.jit(lambda p, s: adamfn.step(tx, p, s, p)[0])
        expected = np.asarray(step(params, state))
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(int(not np.array_equal(step(params, state), expected)))
        _, status = os.waitpid(child, 0)
        assert status == 0, status
        assert np.array_equal(step(params, state), expected)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_formats_it_knows():
    names = adamfn.formats.FORMATS
    known = {name for name in names if answer(get(name), "native_code") is not None}
    assert known == {"float32", "bfloat16", "8bit"}
    assert answer(None, "native_code") == answer(get("float32"), "native_code") == 0


def test_other_dtypes_go_through_xla():
    for g, p in (("float16", "float32"), ("float32", "float16")):
        params, grads = jnp.ones(8, p), jnp.ones(8, g)
        tx = adamfn.adam()
        step = jax.jit(partial(adamfn.step, tx))
        assert "adamfn_step" not in step.lower(grads, tx.init(params), params).as_text()
