# SPDX-License-Identifier: Apache-2.0
"""What the monitor measures is right, for every member, format and wrapper; bad input is named."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamfn
from adamfn import formats, monitor

ADAMW = adamfn.adamw(1e-2)


def float64_figures(g, u, p, mu, nu, rate, count, b1=0.9, b2=0.999, eps=1e-8):
    """The definitions once more, in float64 and with a sort."""
    g, u, p, mu, nu = (np.float64(x) for x in (g, u, p, mu, nu))
    mean, square = mu / (1 - b1**count), nu / (1 - b2**count)
    known, steps = nu > 0, np.abs(u) / rate
    return {
        "gradient": np.sqrt(np.mean(g**2)),
        "update": np.sqrt(np.mean(u**2)),
        "weight": np.sqrt(np.mean(p**2)),
        "update_over_weight": np.sqrt(np.mean(u**2) / np.mean(p**2)),
        "zeros": np.mean(g == 0),
        "still": np.mean(u == 0),
        "rate": rate,
        "agreement": np.mean(np.sign(mu) == np.sign(g), where=g != 0),
        "signal": np.mean(mean[known] ** 2 / square[known]),
        "by_eps": np.mean(np.sqrt(square[known]) < eps),
        **{f"step_{q}": np.quantile(steps, q / 100) for q in (10, 50, 90)},
    }


def noisy(shape, step, scale=1.0):
    random = np.random.default_rng(step)
    return (scale * (random.normal(size=shape) + 0.3)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("tx", "ours"))
def step_of(tx, ours, grads, state, params):
    seen = monitor.observe(tx, grads, state, params, ours=ours)
    updates, state = tx.update(grads, state, params)
    return adamfn.apply_updates(params, updates), state, updates, seen


@functools.cache
def run(tx, steps, shape, scale=1.0, ours=None):
    """Some steps of noisy gradients, and what was seen of the last."""
    params = {"w": noisy(shape, 1000)}
    state = tx.init(params)
    for number in range(steps):
        grads, before = {"w": noisy(shape, number, scale)}, params
        grads["w"][0, :3] = 0
        params, state, updates, seen = step_of(tx, ours, grads, state, params)
    return seen, grads["w"], updates["w"], before["w"], state


@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_figures_are_their_definitions(scale):
    seen, g, u, p, state = run(ADAMW, 7, (32, 40), scale)
    expected = float64_figures(g, u, p, state[0].mu["w"], state[0].nu["w"], 1e-2, 7)
    found = seen.leaves["w"]
    assert int(seen.step) == 7
    for name, value in expected.items():
        # Quantiles are linear from one of the steps to the next; all else has some roundings.
        tolerance = 0.1 if name.startswith("step") else 1e-5
        np.testing.assert_allclose(found[name], value, rtol=tolerance, err_msg=name)
    assert found["not_finite_gradient"] == found["not_finite_weight"] == 0


@pytest.mark.parametrize("scale", [1e-25, 1e18])
def test_no_square_vanishes_or_overflows(scale):
    seen, g, *_ = run(ADAMW, 1, (32, 40), scale)
    expected = np.sqrt(np.mean(np.float64(g) ** 2))
    np.testing.assert_allclose(seen.leaves["w"]["gradient"], expected, rtol=1e-5)


FAMILY = [
    adamfn.adam(1e-2, nesterov=True),
    adamfn.amsgrad(1e-2),
    adamfn.nadam(1e-2),
    adamfn.radam(1e-2),
    adamfn.adamax(1e-2),
    adamfn.lazy_adam(1e-2),
]


@pytest.mark.parametrize("tx", FAMILY)
def test_every_member_of_the_family_is_read(tx):
    # Of a constant gradient the moments have no noise: each ratio is 1.
    params = {"w": jnp.ones((4, 3))}
    state, grads = tx.init(params), {"w": jnp.full((4, 3), 0.5)}
    _, state = tx.update(grads, state, params)
    found = monitor.observe(tx, grads, state, params).leaves["w"]
    np.testing.assert_allclose([found["signal"], found["agreement"]], 1, rtol=1e-5)
    assert found["by_eps"] == 0


LEAN = {name: adamfn.adam(1e-2, moments=name) for name in formats.FORMATS}


@pytest.mark.parametrize("moments", formats.FORMATS)
def test_every_format_is_decoded(moments):
    exact, lean = (run(LEAN[name], 5, (32, 256))[0] for name in ("float32", moments))
    shared = moments in ("factored", "blockmean")  # nu is not the element's own
    for name in ("agreement",) if shared else ("agreement", "step_50", "signal"):
        # What formats do to one step of the moments.
        np.testing.assert_allclose(lean.leaves["w"][name], exact.leaves["w"][name], rtol=0.1)


def test_codes_at_the_ends_are_counted():
    seen, _, _, _, state = run(LEAN["8bit"], 5, (32, 256))
    mu, nu = (np.asarray(x["w"], int) for x in state[0][1:3])
    expected = (nu == 1).mean(), (nu == 255).mean(), (np.abs(mu) == 127).mean()
    found = [seen.leaves["w"][name] for name in ("lowest", "highest", "largest")]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    seen, _, _, _, state = run(LEAN["4bit"], 5, (32, 256))
    codes = np.asarray(state[0].nu["w"], int)[np.asarray(state[0].nu["w"]) > 0] - 1
    level, place = codes // 15, codes % 15
    expected = (level == 16).sum(), (level == 0).sum(), np.isin(place, (0, 14)).sum()
    found = [seen.leaves["w"][name] * 32 * 256 for name in ("lowest", "highest", "largest")]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert min(expected) > 0


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_layers_that_a_scan_stacks_are_measured_each(moments):
    tx = adamfn.adam(1e-2, moments=moments)
    params = {"blocks": {"w": noisy((3, 32, 256), 0)}, "out": noisy((8,), 1)}

    @functools.partial(jax.jit, static_argnums=1)
    def look(params, axis=None):
        grads = jax.tree.map(lambda p: p * p, params)
        layers = None if axis is None else {"blocks": axis}
        return monitor.observe(tx, grads, tx.init(params), params, layers=layers).leaves

    seen = look(params, 0)
    assert seen["out"]["gradient"].shape == ()
    for layer in range(3):
        own = {name: x[layer] for name, x in seen["blocks/w"].items()}
        expected = look({"w": params["blocks"]["w"][layer]})["w"]
        assert own.keys() == expected.keys()
        for name in own:
            # The noise of a layer in a stack is that of other elements.
            tolerance = 1e-5 if moments == "float32" else 0.03
            np.testing.assert_allclose(own[name], expected[name], rtol=1e-5, atol=tolerance)
    if moments == "float32":
        along = look({"blocks": {"w": np.moveaxis(params["blocks"]["w"], 0, 1)}}, 1)
        for name, value in seen["blocks/w"].items():
            np.testing.assert_allclose(along["blocks/w"][name], value, rtol=1e-5)


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1e9), tx),
    "our chain": lambda tx: adamfn.chain(optax.clip_by_global_norm(1e9), tx),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "masked": lambda tx: optax.masked(tx, {"w": True}),
    "partition": lambda tx: optax.partition({"a": tx}, {"w": "a"}),
    "packed": adamfn.packed,
    "packed in a chain": lambda tx: adamfn.chain(optax.clip_by_global_norm(1e9), adamfn.packed(tx)),
    "with_backend": lambda tx: adamfn.with_backend(adamfn.packed(tx), "xla"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_our_states_are_found_inside_wrappers(name):
    """The same figures; of those that hand their states on alike, one is run."""
    wrapped = WRAPPERS[name](ADAMW)
    ours = None if "packed" in name or name in ("our chain", "with_backend") else ADAMW
    expected = run(ADAMW, 5, (32, 40))[0].leaves["w"]
    if name not in ("MultiSteps", "partition", "packed in a chain", "with_backend"):
        params = {"w": noisy((32, 40), 0)}
        look = functools.partial(monitor.observe, wrapped, ours=ours)
        seen = jax.eval_shape(look, params, wrapped.init(params), params)
        assert {figure for _, figure, _ in seen.places} == expected.keys()
        return
    found = run(wrapped, 5, (32, 40), ours=ours)[0].leaves["w"]
    assert found.keys() == expected.keys()
    for figure, value in expected.items():
        np.testing.assert_allclose(found[figure], value, rtol=1e-5)


def test_the_rate_of_inject_hyperparams_is_found():
    tx = optax.inject_hyperparams(adamfn.adam)(learning_rate=0.25)
    seen = run(tx, 2, (2, 5), ours=adamfn.adam(0.25))[0]
    assert seen.leaves["w"]["rate"] == 0.25


def test_groups_have_rates_of_their_own_and_masked_leaves_no_moments():
    groups = {"a": adamfn.adam(0.5), "b": adamfn.adam(0.25), "none": optax.set_to_zero()}
    tx = optax.partition(groups, {"x": "a", "y": "b", "z": "none"})
    params = {name: jnp.ones(3) for name in "xyz"}
    seen = monitor.observe(tx, params, tx.init(params), params, ours=adamfn.adam()).leaves
    assert [float(seen[name]["rate"]) for name in "xy"] == [0.5, 0.25]
    assert "signal" in seen["y"]
    assert "signal" not in seen["z"]
    assert seen["z"]["still"] == 1


def test_formats_may_depend_on_the_dtype_of_the_leaf():
    tx = adamfn.adam(moments=lambda _, x: "8bit" if x.dtype == jnp.bfloat16 else "float32")
    params = {"a": jnp.ones((64, 128), jnp.bfloat16), "b": jnp.ones((64, 128))}
    seen = monitor.observe(tx, params, tx.init(params), params).leaves
    assert {"signal"} <= {*seen["a"]} & {*seen["b"]}


def test_packed_leaves_inside_a_mask_are_found():
    params = {"a": jnp.ones(3), "b": jnp.ones(4), "c": jnp.ones(5)}
    tx = adamfn.packed(adamfn.adam())
    masked = optax.masked(tx, {"a": True, "b": False, "c": True})
    grads = {name: p * (2 + place) for place, (name, p) in enumerate(params.items())}
    seen = monitor.observe(masked, grads, masked.init(params), params, ours=tx).leaves
    assert [name for name in params if "signal" in seen[name]] == ["a", "c"]


def test_flax_optimizers_are_read():
    from flax import nnx

    from adamfn.interop.flax import Optimizer

    for kind in (Optimizer, nnx.Optimizer):
        tx = adamfn.adamw(1e-2, moments="8bit")
        model = nnx.Linear(64, 256, rngs=nnx.Rngs(0))
        optimizer = kind(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x, tx=tx):
            grads = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
            trees = (grads, optimizer.opt_state, nnx.state(model, nnx.Param))
            seen = monitor.observe(tx, *map(nnx.as_pure, trees))
            optimizer.update(model, grads)
            return seen

        seen = step(model, optimizer, jnp.ones((2, 64)))
        assert list(seen.leaves) == ["bias", "kernel"]
        assert seen.leaves["kernel"]["largest"] > 0


BASE = functools.partial(adamfn.adam, 1e-2)
W, V = {"w": jnp.ones((3, 4))}, {"w": jnp.ones((3, 4)), "v": jnp.ones(2)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tx": optax.adam(1e-2)}, TypeError, r"observe: tx is a .*; expected a transformation of"),
        ({"ours": adamfn.adam}, TypeError, r"ours is <function adam .*; expected a transformation"),
        ({"ours": BASE().init(W)}, TypeError, r"ours is a tuple; expected a transformation"),
        ({"state": optax.adam(1e-2).init(W)}, ValueError, r"found no state of scale_by_moments, "),
        ({"state": adamfn.adamax().init(W)}, ValueError, r"found no state of scale_by_moments, "),
        ({"state": BASE().init(V)}, ValueError, r"mu differ at \['v'\]: found nothing"),
        (
            {"params": None},
            ValueError,
            r"observe: params and grads differ at \['w'\]: found nothing, expected float32",
        ),
        (
            {"params": {"w": jnp.ones(4)}},
            ValueError,
            r"differ at \['w'\]: found float32\[4\], expected",
        ),
        ({"grads": {"w": jnp.ones((3, 4), int)}}, TypeError, r"the leaf at \['w'\] is int32"),
        (
            {"layers": {"w": 2}},
            ValueError,
            r"layers has 'w': 2; .* an axis of .*: w float32\[3,4\]\.",
        ),
        (
            {"layers": {"v": 0}},
            ValueError,
            r"layers has 'v': 0; expected the beginning of a path.*: w f",
        ),
        ({"every": 0}, ValueError, r"every is 0; expected a number of steps"),
        ({"every": True}, ValueError, r"every is True; expected a number of steps"),
        ({"when": "no"}, TypeError, r"when is a str; expected True, False or bool\[\]"),
        ({"when": jnp.ones(2, bool)}, TypeError, r"when is bool\[2\]; expected True, False or"),
        (
            {"layers": ["w"]},
            TypeError,
            r"layers is \['w'\]; expected axes by paths: \{'blocks': 0\}",
        ),
        (
            {"layers": {"w": "0"}},
            ValueError,
            r"layers has 'w': '0'; expected .* an axis of all leaves",
        ),
        ({"learning_rat": 1.0}, TypeError, r"observe: found the argument learning_rat=1.0, which"),
    ],
)
def test_bad_input_is_named(change, error, message):
    given = {"tx": BASE(), "grads": W, "state": BASE().init(W), "params": W} | change
    with pytest.raises(error, match=message):
        monitor.observe(**given)


def test_what_was_not_looked_at_is_named():
    seen = monitor.observe(BASE(), W, BASE().init(W), W, when=jnp.array(False))
    assert monitor.looks(seen) == []
    for show in (monitor.faults, monitor.flat, monitor.report, monitor.picture):
        with pytest.raises(ValueError, match="found no step that was looked at"):
            show(seen)
    with pytest.raises(TypeError, match="found a dict; expected what `observe` returned"):
        monitor.faults({})


def test_weights_with_corrections_move_though_their_bfloat16_does_not():
    params = {"w": jnp.ones(8, jnp.bfloat16)}
    tx = adamfn.chain(adamfn.adam(1e-5), adamfn.round_weights(32))
    grads = {"w": jnp.ones(8, jnp.bfloat16)}
    state = tx.init(params)
    figures = monitor.observe(tx, grads, state, params).leaves["w"]
    moved, state = adamfn.step(tx, grads, state, params)
    assert np.array_equal(moved["w"], params["w"])
    np.testing.assert_allclose(figures["update"], 1e-5, rtol=1e-2)  # of a float32 weight of 1
    assert figures["still"] == 0
    assert "lost" not in figures
    assert not monitor.faults(monitor.observe(tx, grads, state, moved))


@pytest.mark.parametrize("every", [np.int64(10), 2**40])
def test_every_is_any_whole_number(every):
    tx = BASE()
    assert monitor.observe(tx, W, tx.init(W), W, every=every).step == 1


def test_a_step_leaves_out_what_is_not_trained():
    tx, grads = BASE(), {**W, "frozen": None}
    params, state = {**W, "frozen": jnp.ones(2)}, BASE().init({**W, "frozen": None})
    moved, _, seen = monitor.step(tx, grads, state, params)
    assert [*seen.leaves] == ["w"]
    chex.assert_trees_all_equal(moved, adamfn.step(tx, grads, state, params)[0])


def test_a_step_returns_updates_where_they_are_asked_for():
    tx, state = BASE(), BASE().init(W)
    *moved, seen = monitor.step(tx, W, state, W, return_updates=True)
    chex.assert_trees_all_equal(tuple(moved), adamfn.step(tx, W, state, W, return_updates=True))
    assert seen.step == 1


def test_an_observation_that_is_traced_is_refused():
    tx = BASE()
    with pytest.raises(TypeError, match="Return it from the jitted function"):
        jax.jit(lambda: monitor.faults(monitor.observe(tx, W, tx.init(W), W)))()


def test_pictures_take_any_row_of_losses():
    tx = BASE()
    seen = monitor.observe(tx, W, tx.init(W), W)
    for losses in (np.array([1.0, 2.0]), jnp.array([1.0, 2.0]), [jnp.array(1.0), 2.0]):
        (line,) = monitor.picture([seen], losses).axes[0].lines
        assert len(line.get_xdata()) == 2
    with pytest.raises(TypeError, match=r"losses is a str; .* Which figure is drawn is figure="):
        monitor.picture([seen], "signal")
    with pytest.raises(ValueError, match="rows is -1; expected how many layers"):
        monitor.report(seen, rows=-1)
    with pytest.raises(ValueError, match="no figure 'gradient'; expected layers"):
        monitor.picture(monitor.observe(tx, {}, tx.init({}), {}))


def test_ticks_of_pictures_are_whole_steps():
    tx, state, run = BASE(), BASE().init(W), []
    for _ in range(3):
        _, state, seen = monitor.step(tx, W, state, W)
        run.append(seen)
    ticks = monitor.picture(run).axes[1].get_xticks()
    assert all(tick == round(tick) for tick in ticks)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64", "complex64"])
def test_figures_are_float32_under_x64_and_strict_promotion(dtype):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        params, grads = jnp.ones((2, 3), dtype), jnp.full((2, 3), 0.5, dtype)
        tx = adamfn.adamw(0.25, weight_decay=0.0)
        looked = functools.partial(monitor.step, tx, layers={"w": 0})
        *_, seen = jax.jit(looked)({"w": grads}, tx.init({"w": params}), {"w": params})
    assert seen.values.dtype == jnp.float32
    figures = seen.leaves["w"]
    for name, value in {"gradient": 0.5, "weight": 1, "update": 0.25, "signal": 1}.items():
        np.testing.assert_allclose(figures[name], [value, value], rtol=1e-6)
