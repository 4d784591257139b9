"""What the monitor measures is right, changes nothing, and finds the faults that are there."""

import functools
import io

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamfn
from adamfn import formats, monitor

WIDTH, HIDDEN, EXAMPLES = 16, 128, 256
ADAM = adamfn.adam(1e-2)  # compiled once for all runs that share it
BITS = jnp.bfloat16


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


def run(tx, steps, shape, scale=1.0, ours=None, **options):
    """Some steps of noisy gradients, and what was seen of the last."""
    params = {"w": noisy(shape, 1000)}
    state = tx.init(params)

    @jax.jit
    def step(grads, state, params):
        seen = monitor.observe(tx, grads, state, params, ours=ours, **options)
        updates, state = tx.update(grads, state, params)
        return adamfn.apply_updates(params, updates), state, updates, seen

    for number in range(steps):
        grads, before = {"w": noisy(shape, number, scale)}, params
        grads["w"][0, :3] = 0
        params, state, updates, seen = step(grads, state, params)
    return seen, grads["w"], updates["w"], before["w"], state


@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_figures_are_their_definitions(scale):
    seen, g, u, p, state = run(adamfn.adamw(1e-2), 7, (32, 40), scale)
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
    seen, g, *_ = run(adamfn.adamw(1e-2), 1, (32, 40), scale)
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


@pytest.mark.parametrize("moments", formats.FORMATS)
def test_every_format_is_decoded(moments):
    tx = adamfn.adam(1e-2, moments=moments)
    exact, lean = run(adamfn.adam(1e-2), 5, (32, 256))[0], run(tx, 5, (32, 256))[0]
    shared = moments in ("factored", "blockmean")  # nu is not the element's own
    for name in ("agreement",) if shared else ("agreement", "step_50", "signal"):
        # What formats do to one step of the moments.
        np.testing.assert_allclose(lean.leaves["w"][name], exact.leaves["w"][name], rtol=0.1)


def test_codes_at_the_ends_are_counted():
    seen, _, _, _, state = run(adamfn.adam(moments="8bit"), 5, (32, 256))
    mu, nu = (np.asarray(x["w"], int) for x in state[0][1:3])
    expected = (nu == 1).mean(), (nu == 255).mean(), (np.abs(mu) == 127).mean()
    found = [seen.leaves["w"][name] for name in ("lowest", "highest", "largest")]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    seen, _, _, _, state = run(adamfn.adam(moments="4bit"), 5, (32, 256))
    codes = np.asarray(state[0].nu["w"], int)[np.asarray(state[0].nu["w"]) > 0] - 1
    level, place = codes // 15, codes % 15
    expected = (level == 16).sum(), (level == 0).sum(), np.isin(place, (0, 14)).sum()
    found = [seen.leaves["w"][name] * 32 * 256 for name in ("lowest", "highest", "largest")]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert min(expected) > 0


@pytest.mark.parametrize("moments", ["float32", "8bit", "4bit"])
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
    tx = adamfn.adamw(1e-2)
    wrapped = WRAPPERS[name](tx)
    ours = None if "packed" in name or name in ("our chain", "with_backend") else tx
    expected = run(tx, 5, (8, 40))[0]
    found = run(wrapped, 5, (8, 40), ours=ours)[0]
    assert found.leaves["w"].keys() == expected.leaves["w"].keys()
    for figure, value in expected.leaves["w"].items():
        np.testing.assert_allclose(found.leaves["w"][figure], value, rtol=1e-5)


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


def test_packed_leaves_inside_a_mask_are_found():
    params = {"a": jnp.ones(3), "b": jnp.ones(4), "c": jnp.ones(5)}
    tx = adamfn.packed(adamfn.adam())
    masked = optax.masked(tx, {"a": True, "b": False, "c": True})
    grads = {name: p * (2 + place) for place, (name, p) in enumerate(params.items())}
    seen = monitor.observe(masked, grads, masked.init(params), params, ours=tx).leaves
    assert [name for name in params if "signal" in seen[name]] == ["a", "c"]


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
def seen_and_moved(tx, grads, state, params, ours):
    seen = monitor.observe(tx, grads, state, params, ours=ours)
    updates, state = tx.update(grads, state, params)
    return seen, adamfn.apply_updates(params, updates), state


def train(tx, params, loss=network, steps=12, poison=None, ours=None):
    """A short training run, and what was seen of every step."""
    state, run = tx.init(params), []
    for number in range(steps):
        grads = gradients(params, number, loss)
        grads = grads if poison is None else poison(grads)
        seen, params, state = seen_and_moved(tx, grads, state, params, ours)
        run.append(seen)
    return run


def found_in(run):
    return [(fault.layer, fault.word) for fault in monitor.faults(run)]


@pytest.mark.parametrize(
    ("moments", "dtype"), [("float32", jnp.float32), ("8bit", BITS), ("4bit", jnp.float32)]
)
def test_nothing_is_reported_of_a_healthy_network(moments, dtype):
    run = train(adamfn.adamw(1e-2, moments=moments), new_network(dtype), steps=30)
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

    run = train(adamfn.adam(1e-2, eps=1e-4), new_network(), poison=poison)
    assert found_in(run) == [("out", "decided by eps")]
    tiny = jax.tree.map(lambda p: 1e-2 * p, new_network())
    run = train(adamfn.adam(1e-5, eps=1e-3), tiny, lambda p, batch: 1e-3 * network(p, batch))
    assert {word for _, word in found_in(run)} == {"decided by eps"}


def test_updates_that_rounding_loses_are_found():
    run = train(adamfn.adam(1e-6), new_network() | {"out": new_network(BITS)["out"]})
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

    tx = adamfn.adam(1e-3, eps=1e-30, moments="4bit")
    params = new_network() | {"out": 10 * new_network()["out"]}
    found = found_in(train(tx, params, loss))
    assert found == [("second/kernel", "codes at their limit")]


def test_a_frozen_leaf_is_found():
    labels = {"first": "train", "second": "train", "out": "freeze"}
    frozen = optax.partition({"train": ADAM, "freeze": optax.set_to_zero()}, labels)
    assert found_in(train(frozen, new_network(), ours=ADAM)) == [("out", "frozen")]
    # At a rate of zero nothing moves, and nothing is wrong.
    assert found_in(train(adamfn.adam(0.0), new_network())) == []


def test_one_layer_of_a_stack_is_named():
    params = {"blocks": jnp.ones((3, 4, 4)), "x": jnp.ones(2), "y": jnp.ones(2)}
    grads = {**params, "blocks": params["blocks"].at[1].set(0)}
    tx = adamfn.adam()
    seen = monitor.observe(tx, grads, tx.init(params), params, layers={"blocks": 0})
    assert found_in(seen) == [("blocks[1]", "dead")]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("way", ["update", "step", "in order"])
def test_a_look_changes_no_bit_of_the_training(every, way):
    tx = adamfn.adamw(1e-2, moments="8bit")
    params = new_network() | {"wide": jnp.ones((WIDTH, 256)) / 256}  # codes, and float32 leaves

    def loss(params, batch):
        return network(params, batch) + jnp.mean((batch[0] @ params["wide"]) ** 2)

    @functools.partial(jax.jit, static_argnums=3, donate_argnums=(0, 1))
    def step(params, state, batch, look):
        grads = jax.grad(loss)(params, batch)
        if way == "in order" and look:
            return monitor.step(tx, grads, state, params, every=every)
        seen = monitor.observe(tx, grads, state, params, every=every) if look else None
        if way != "update":
            return *adamfn.step(tx, grads, state, params), seen
        updates, state = tx.update(grads, state, params)
        return adamfn.apply_updates(params, updates), state, seen

    runs = []
    for look in (False, True):
        run = jax.tree.map(jnp.copy, (params, tx.init(params)))
        steps = []
        for number in range(7):
            random = np.random.default_rng(number)
            batch = [random.normal(size=(EXAMPLES, n)).astype(np.float32) for n in (WIDTH, 4)]
            *run, seen = step(*run, batch, look)
            steps.append(int(seen.step) if look else None)
        runs.append(jax.tree.map(np.asarray, run))
    assert steps == [number if number % every == 1 % every else 0 for number in range(1, 8)]
    for a, b in zip(*map(jax.tree.leaves, runs), strict=True):
        np.testing.assert_array_equal(a, b)


def copies_in_a_loop(observed):
    """How many arrays of the parameter's size a loop of training steps copies at each step."""
    tx = adamfn.adamw(1e-2)
    params = jnp.ones((WIDTH, HIDDEN))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def steps(params, state, batches):
        def step(carry, batch):
            params, state = carry
            grads = jax.grad(lambda p: jnp.mean((batch @ p) ** 2))(params)
            *carry, seen = observed(tx, grads, state, params)
            return tuple(carry), seen

        return jax.lax.scan(step, (params, state), batches)

    batches = jnp.ones((5, EXAMPLES, WIDTH))
    program = steps.lower(params, tx.init(params), batches).compile().as_text()
    body = next(part for part in program.split("\n\n") if "adamfn_step" in part)
    return body.count(f"= f32[{WIDTH},{HIDDEN}]{{1,0}} copy(")


def test_a_step_that_waits_for_its_look_copies_nothing():
    def in_no_order(tx, grads, state, params):
        seen = monitor.observe(tx, grads, state, params, every=10)
        return *adamfn.step(tx, grads, state, params), seen

    assert copies_in_a_loop(in_no_order) >= 3  # what a copy looks like: the moments, the weights
    assert copies_in_a_loop(functools.partial(monitor.step, every=10)) == 0


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
        ({"params": None}, ValueError, r"observe: params at w: found nothing; expected the shape"),
        ({"params": {"w": jnp.ones(4)}}, ValueError, r"params at w: found float32\[4\]"),
        ({"grads": {"w": jnp.ones((3, 4), int)}}, TypeError, r"the leaf at \['w'\] is int32"),
        ({"layers": {"w": 2}}, ValueError, r"axis 2 for w, which is float32\[3,4\]; .* -2 to 1"),
        ({"layers": {"v": 0}}, ValueError, r"layers has 'v', where no leaf is; .*: w\."),
        ({"every": 0}, ValueError, r"every is 0; expected a number of steps"),
        ({"every": True}, ValueError, r"every is True; expected a number of steps"),
        ({"when": "no"}, TypeError, r"when is a str; expected True, False or bool\[\]"),
        ({"when": jnp.ones(2, bool)}, TypeError, r"when is bool\[2\]; expected True, False or"),
        ({"layers": ["w"]}, TypeError, r"layers is \['w'\]; expected an axis for the beginning"),
        ({"layers": {"w": "0"}}, TypeError, r"layers is \{'w': '0'\}; expected an axis for"),
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
