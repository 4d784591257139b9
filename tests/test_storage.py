# SPDX-License-Identifier: Apache-2.0
"""`moments=`: every member of the family with every format."""

from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamfn
from adamfn import formats

RECIPES = ["adam", "adamw", "amsgrad", "nadam", "radam", "adamax", "lazy_adam", "ademamix", "adopt"]
LEAN = [name for name in formats.FORMATS if name != "float32"]
PARAMS = {
    "table": jnp.full((128, 256), 0.5),
    "block": [{"kernel": jnp.full((256, 128), 0.5), "bias": jnp.zeros(128)}],
    "none": None,
}
SMALL = {"kernel": jnp.full((128, 256), 0.5), "bias": jnp.zeros(128)}


def gradients(step, params=PARAMS):
    def normal(p):
        return 1e-3 * np.random.default_rng(step).standard_normal(p.shape)

    return jax.tree.map(lambda p: normal(p).astype(p.dtype), params)


def trail(tx, steps, params=PARAMS):
    """The updates of every step, for gradients that grow and shrink."""
    update, state = jax.jit(tx.update, donate_argnums=1), tx.init(params)
    for step in range(steps):
        size = np.float32(1.5 + np.sin(step))
        grads = jax.tree.map(lambda g, size=size: g * size, gradients(step, params))
        updates, state = update(grads, state, params)
        yield updates
    yield state


def run(tx, steps):
    """The last updates and the state."""
    *_, updates, state = trail(tx, steps)
    return updates, state


def flat(tree):
    return np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)])


def cosine(a, b):
    return flat(a) @ flat(b) / np.linalg.norm(flat(a)) / np.linalg.norm(flat(b))


@cache
def exact_trail(recipe, steps, small=False):
    """The updates of a recipe in float32."""
    return list(trail(getattr(adamfn, recipe)(), steps, SMALL if small else PARAMS))[:-1]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("recipe", "moments"),
    [
        *(("adam", moments) for moments in LEAN),
        *(("amsgrad", moments) for moments in ("bfloat16", "4bit", "factored")),
        *((recipe, "8bit") for recipe in ("nadam", "lazy_adam", "ademamix", "adopt")),
        *((recipe, "factored") for recipe in ("adamax", "adopt")),
        ("lazy_adam", "blockmean"),
    ],
)
def test_a_member_in_a_format_follows_itself_in_float32(recipe, moments):
    *lean, _ = trail(getattr(adamfn, recipe)(moments=moments), 20, SMALL)
    full = exact_trail(recipe, 20, small=True)
    # The first step is taken with moments that were not yet stored.
    np.testing.assert_allclose(flat(lean[0]), flat(full[0]), rtol=1e-5)
    # Adamax takes its denominator as it is, and no root halves what it lacks. That of ADOPT begins
    # at the square of one gradient, for which coarse levels and means are no match.
    assert cosine(lean[-1], full[-1]) > {"adamax": 0.9, "adopt": 0.85}.get(recipe, 0.97)


STEPS, SIDE = 150, 128
NOISE = np.random.default_rng(0).standard_normal((STEPS, SIDE, SIDE)).astype(np.float32)
DECADES = np.random.default_rng(1).permutation(np.logspace(-4, 0, SIDE, dtype=np.float32))


def unlike(numbers, step, noise):
    """Gradients whose sizes differ by rows, by columns, in a column that stays and one that moves.

    With `numbers`, NumPy or JAX's, as every product is exact to a rounding in both.
    """
    places = numbers.arange(SIDE)
    return {
        "rows": noise * DECADES[:, None],
        "columns": noise * DECADES,
        "outer": noise * DECADES[:, None] ** 0.5 * DECADES**0.5,
        "elements": noise * np.stack([np.roll(DECADES, k) for k in range(SIDE)]),
        "a column": noise * numbers.where(places == 7, np.float32(1000), 1),
        "now and then": noise * numbers.where(places == 7 * step % SIDE, np.float32(1000), 1),
    }


def mean(axis):
    return lambda nu: np.broadcast_to(nu.mean(axis, keepdims=True), nu.shape)


def factored(nu):
    return nu.mean(1, keepdims=True) * nu.mean(0) / nu.mean()


@cache
def exact_moments():
    """Adam's in float64, with b1 = 0.9 and b2 = 0.99: mu and g^2 of the last step, nu before it."""
    moments = {}
    for step in range(STEPS):
        for name, g in unlike(np, step, NOISE[step]).items():
            mu, square, nu = moments.get(name, (0, 0, 0))
            g, nu = g.astype(np.float64), nu + 0.01 * (square - nu)
            moments[name] = mu + 0.1 * (g - mu), g**2, nu
    return moments


@pytest.mark.parametrize(
    ("moments", "shared", "least", "longer"),
    # Half as far again from 1 as was found. In 4 bits, columns that move are the worst case, and
    # scales that differ by elements the next.
    [
        ("bfloat16", np.copy, 0.9999, 0.001),
        ("8bit", np.copy, 0.995, 0.018),
        ("4bit", np.copy, 0.75, 0.35),
        ("factored", factored, 0.9988, 0.002),
        ("blockmean", mean(-1), 0.996, 0.004),
        (formats.Pair(formats.Linear(), formats.BlockMean(-2)), mean(-2), 0.9988, 0.002),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_gradients_of_unlike_sizes(moments, shared, least, longer):
    """Beside Adam in float64: the cosine, and how much longer an update is."""
    tx = adamfn.scale_by_moments(b2=0.99, eps=0.0, moments=moments)
    tx = adamfn.chain(tx, adamfn.bias_correct(b2=0.99))

    def body(state, given):
        updates, state = tx.update(unlike(jnp, *given), state)
        return state, updates

    def last(noise):
        state = tx.init(unlike(jnp, 0, noise[0]))
        before, step = (jnp.arange(STEPS - 1), noise[:-1]), (STEPS - 1, noise[-1])
        state, _ = jax.lax.scan(lambda *of: (body(*of)[0], None), state, before)
        return body(state, step)[1]

    for name, u in jax.jit(last)(NOISE).items():
        mu, square, nu = exact_moments()[name]
        # What is shared is what was stored.
        nu = (0.99 * shared(nu) + 0.01 * square) / (1 - 0.99**STEPS)
        expected = mu / (1 - 0.9**STEPS) / np.sqrt(nu)
        length = np.linalg.norm(flat(u)) / np.linalg.norm(flat(expected))
        assert cosine(u, expected) > least, name
        assert abs(length - 1) < longer, name


@pytest.mark.parametrize(
    "make",
    [adamfn.adam, adamfn.nadam, adamfn.adamax, adamfn.lazy_adam, adamfn.radam, adamfn.adopt],
)
def test_4_bits_bear_no_larger_b1(make):
    for moments in ("4bit", formats.FourBit(64), "8bit"):
        make(b1=0.95, moments=moments)
    with pytest.raises(
        ValueError, match=r"b1 is 0.96, and moments is FourBit.*; .* Use moments='8bit"
    ):
        make(b1=0.96, moments="4bit")
    tx = make(b1=0.96, moments=lambda path, leaf: formats.FourBit(16))
    with pytest.raises(ValueError, match=r"b1 is 0.96, and moments at .* is FourBit\(block=16\)"):
        tx.init(PARAMS)


def test_4_bits_bear_no_slow_average():
    # After 2000 noisy steps the cosine with float32's update was 0.79 to 0.86, and 0.32 to 0.58
    # with a b3 of 0.999; in 8 bits 0.98 and more.
    adamfn.ademamix(b3=0.95, moments="4bit")
    for b3 in (0.96, 0.9999, lambda count: 0.9):
        with pytest.raises(ValueError, match=r"b3 is .*, and moments is FourBit.*moments='8bit'"):
            adamfn.ademamix(b3=b3, moments="4bit")
        adamfn.ademamix(b3=b3, moments="8bit")
    tx = adamfn.scale_by_ademamix(moments=lambda path, leaf: "4bit")
    with pytest.raises(ValueError, match=r"b3 is 0\.9999, and moments at .* is FourBit"):
        tx.init(PARAMS)


@pytest.mark.parametrize("moments", formats.FORMATS)
def test_a_state_is_a_plain_tree_of_arrays(moments):
    tx = adamfn.adam(moments=moments)
    state = tx.init(PARAMS)
    spec = jax.eval_shape(tx.init, PARAMS)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), spec
    )
    same(state, jax.jit(tx.init)(PARAMS))
    for field in ("mu", "nu"):
        tree = optax.tree.get(state, field)
        assert tree["none"] is None
        assert tree["block"][0]["bias"].dtype == jnp.float32  # too small for any format
    _, after = tx.update(gradients(0), state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    leaves, treedef = jax.tree.flatten(after)
    same(
        tx.update(gradients(1), treedef.unflatten(map(np.asarray, leaves))),
        tx.update(gradients(1), after),
    )


@pytest.mark.parametrize("moments", LEAN)
def test_a_run_is_reproducible_and_resumes_to_the_bit(moments):
    tx = adamfn.adam(moments=moments)
    update = jax.jit(tx.update, donate_argnums=1)
    states = []
    for _ in range(2):
        state = tx.init(PARAMS)
        for step in range(4):
            _, state = update(gradients(step), state)
            if step == 1:
                state = jax.tree.map(lambda x: jnp.array(np.asarray(x)), state)
        states.append(state)
    same(*states)


@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_the_noise_differs_between_leaves_and_steps(moments):
    params = [jnp.ones((64, 256)), jnp.ones((64, 256))]
    g = 1e-3 * jax.random.normal(jax.random.key(0), (64, 256))
    tx = adamfn.adam(moments=moments)
    _, (first, *_) = tx.update([g, g], tx.init(params))
    kept = [jax.tree.leaves(x) for x in first.nu]
    assert any(np.any(a != b) for a, b in zip(*kept, strict=True))
    later = first._replace(count=jnp.int32(7))
    _, a = tx.update([0 * g, 0 * g], (first, *tx.init(params)[1:]))
    _, b = tx.update([0 * g, 0 * g], (later, *tx.init(params)[1:]))
    assert any(
        np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (a[0].nu, b[0].nu)), strict=True)
    )


def test_seeds_round_independently():
    """Moments and weights, for members of a vmap; and without bias, so that a mean is right."""
    number, p = 256, jnp.ones((16, 256), jnp.bfloat16)
    g = 1e-3 * jax.random.normal(jax.random.key(0), p.shape)

    def step(seed):
        ratio = adamfn.scale_by_moments(moments="8bit", seed=seed)
        tx = adamfn.chain(ratio, adamfn.scale_by_lr(1e-3), adamfn.round_weights(16, seed=seed))
        updates, (state, *_) = tx.update(g, tx.init(p), p)
        stored = formats.Stored(state.mu, state.nu, state.scales["leaf"][0])
        return formats.get("8bit").decode(stored)[1], updates

    found = jax.jit(jax.vmap(step))(jnp.arange(number))
    exact = 0.001 * g**2, -1e-3 * 0.1 * g / (jnp.sqrt(0.001 * g**2) + 1e-8 * 0.001**0.5)
    for x, expected in zip(found, exact, strict=True):
        errors = np.float64(x - expected).reshape(number, -1)
        errors = errors[:, np.ptp(errors, axis=0) > 0]  # those between two levels
        errors /= errors.std(0)
        assert errors.shape[1] > 2000
        gaps = np.corrcoef(errors) - np.eye(number)
        assert np.abs(gaps).max() < 6 / errors.shape[1] ** 0.5
        assert abs(errors.mean()) < 5 / errors.size**0.5
    for seed, same_as in ((None, 0), (2, 2)):
        np.testing.assert_array_equal(step(seed)[0], found[0][same_as])


def test_every_recipe_and_stage_of_moments_takes_a_seed():
    makers = [*RECIPES, *(name for name in dir(adamfn) if name.endswith("_moments"))]
    for make in (getattr(adamfn, name) for name in [*makers, "round_weights"]):
        tx = make(seed=5)
        assert [stage.seed for stage in tx.update.__self__.stages if stage.seed] == [5]
        for seed in (-1, 2**32, 1.5, True, "1", jnp.ones(()), jnp.arange(2)):
            with pytest.raises(ValueError, match="expected an integer in"):
                make(seed=seed)


def test_a_function_chooses_for_each_leaf():
    seen = {}

    def choose(path, leaf):
        seen[path] = leaf.shape
        return "float32" if path == "table" else formats.Pair(formats.Rounded(), formats.Factored())

    tx = adamfn.adamw(moments=choose)
    state = tx.init(PARAMS)
    assert seen == {"table": (128, 256), "block/0/kernel": (256, 128), "block/0/bias": (128,)}
    assert state[0].nu["table"].dtype == jnp.float32
    assert state[0].mu["block"][0]["kernel"].dtype == jnp.bfloat16
    assert state[0].nu["block"][0]["kernel"] is None
    ((path, (kernel,)),) = state[0].scales.items()
    assert path == "block/0/kernel"
    assert isinstance(kernel[1], formats.means.Factors)
    updates, _ = run(tx, 10)
    assert cosine(updates, exact_trail("adamw", 10)[-1]) > 0.97


@dataclass(frozen=True)
class HalfPrecision:
    """A format as a user would write it: both moments in float16, nu as its root."""

    def encode(self, mu, nu, noise):
        return formats.Stored(mu.astype(jnp.float16), jnp.sqrt(nu).astype(jnp.float16))

    def decode(self, stored):
        return stored.mu.astype(jnp.float32), stored.nu.astype(jnp.float32) ** 2

    def holds(self, shape, dtype):
        return len(shape) > 1 and dtype == jnp.float32


def test_a_format_of_the_users_own():
    tx = adamfn.amsgrad(moments=HalfPrecision())
    updates, state = run(tx, 20)
    assert state[0].nu_max["table"].dtype == jnp.float16
    assert cosine(updates, exact_trail("amsgrad", 20)[-1]) > 0.999
    assert "float16[128,256]" in formats.describe(state)


@pytest.mark.parametrize("moments", ["bfloat16", "8bit", "4bit"])
def test_rows_at_rest_keep_what_is_stored(moments):
    tx = adamfn.lazy_adam(moments=moments)
    params = jnp.ones((32, 256))
    awake = np.arange(32) % 3 == 0
    _, state = tx.update(gradients(0, params), tx.init(params))
    before = state[0]
    for step in range(1, 20):
        g = gradients(step, params) * awake[:, None]
        updates, state = tx.update(g, state)
        assert not np.any(updates[~awake])
    for a, b in zip(
        *(jax.tree.leaves((s.mu, s.nu, s.scales)) for s in (before, state[0])), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a)[~awake], np.asarray(b)[~awake])
    assert np.any(np.asarray(before.nu)[awake] != np.asarray(state[0].nu)[awake])


def test_rows_cannot_rest_where_they_share_a_number():
    with pytest.raises(ValueError, match="scale_by_lazy_moments: the format of the leaf at block"):
        adamfn.lazy_adam(moments="factored").init(PARAMS)


@pytest.mark.parametrize("moments", ["bfloat16", "8bit", "4bit"])
def test_a_stored_maximum_stays(moments):
    tx = adamfn.amsgrad(b2=0.1, moments=moments)  # nu falls by more than a level of 4 bits
    _, state = tx.update(gradients(0), tx.init(PARAMS))
    largest = state[0].nu_max
    for _ in range(20):
        _, state = tx.update(jax.tree.map(jnp.zeros_like, gradients(0)), state)
    same(state[0].nu_max, largest)


@pytest.mark.parametrize(
    ("moments", "dtype"), [*((m, "bfloat16") for m in LEAN), ("8bit", "float16")]
)
def test_narrow_gradients(moments, dtype):
    params = jnp.ones((128, 256), dtype)
    tx = adamfn.adam(moments=moments)
    updates, state = tx.update(gradients(0, params), tx.init(params), params)
    assert updates.dtype == dtype
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), gradients(0, params))
    same(tx.update(wide, tx.init(params))[1], state)


def test_leaves_that_no_format_holds_stay_wide():
    with jax.enable_x64(True):
        params = {
            "double": jnp.ones((64, 256), jnp.float64),
            "complex": jnp.ones((64, 256), jnp.complex64),
            "scalar": jnp.ones(()),
            "short": jnp.ones((4096, 4)),
        }
        tx = adamfn.adam(moments="8bit")
        state = tx.init(params)
        same(state, adamfn.adam().init(params))
        _, state = tx.update(params, state)
        assert state[0].mu["complex"].dtype == jnp.complex64
        assert state[0].nu["double"].dtype == jnp.float64


def test_many_models_at_once():
    batch = jnp.ones((3, 64, 256)) * jnp.arange(1.0, 4.0)[:, None, None]
    tx = adamfn.adam(moments="8bit")
    states = jax.vmap(tx.init)(batch)
    updates, states = jax.vmap(tx.update)(batch, states)
    alone, state = tx.update(batch[2], tx.init(batch[2]))
    np.testing.assert_allclose(updates[2], alone, rtol=1e-6)
    same(jax.tree.map(lambda x: x[2], states[0].nu), state[0].nu)


def test_describe_names_every_leaf_with_its_bytes():
    state = adamfn.adam(moments="8bit").init(PARAMS)
    lines = formats.describe((optax.EmptyState(), state)).splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["block/0/bias", "block/0/kernel", "table"]
    assert lines[1].split()[1] == f"{2 * 256 * 128 + 12 * 256:,}"
    whole = sum(x.nbytes for x in jax.tree.leaves(state[0][1:]))
    assert lines[-1].split() == [f"{whole:,}", "bytes", "in", "all"]
    linear = adamfn.adam(moments=formats.Pair(formats.Linear(), formats.Linear()))
    assert len(formats.describe(linear.init(PARAMS)).splitlines()) == 4
    with pytest.raises(ValueError, match="describe: found no moments in an EmptyState"):
        formats.describe(optax.EmptyState())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("moments", "error", "message"),
    [
        ("9bit", ValueError, "moments is '9bit'; expected one of 'float32', 'bfloat16', '8bit'"),
        (8, TypeError, "moments is 8; expected one of .* or a function of a leaf's path"),
        (formats.EightBit, TypeError, "moments is <class .*EightBit'>; expected"),
        (jnp.float16, TypeError, "moments is .*float16.*; expected"),
    ],
    ids=["name", "number", "class", "dtype"],
)
def test_what_is_no_format(recipe, moments, error, message):
    with pytest.raises(error, match=message):
        getattr(adamfn, recipe)(moments=moments)


def test_a_function_that_returns_no_format():
    tx = adamfn.adam(moments=lambda path, leaf: "none" if path == "table" else "8bit")
    with pytest.raises(ValueError, match="moments is 'none'; expected one of"):
        tx.init(PARAMS)


@pytest.mark.parametrize("block", [0, -16, 100, 15, 256.0, True, "256"])
@pytest.mark.parametrize("make", [formats.EightBit, formats.FourBit, formats.Linear])
def test_a_block_size_that_makes_no_sense(make, block):
    with pytest.raises(ValueError, match=f"{make.__name__}: block is .*; expected a positive mult"):
        make(block=block)


@pytest.mark.parametrize("block", [16, 48, 512])
def test_other_block_sizes(block):
    tx = adamfn.adam(moments=formats.EightBit(block=block))
    updates, state = run(tx, 20)
    (scales,) = state[0].scales["table"]
    assert scales.scale.shape == (128, -(-256 // formats.blocks.size_for(256, block)))
    assert cosine(updates, exact_trail("adam", 20)[-1]) > 0.99


@pytest.mark.parametrize(
    ("made", "used", "message"),
    [
        (
            "float32",
            "8bit",
            r"at block/0/kernel the state has mu float32\[256,128\].*; expected mu int8\[256,128\]",
        ),
        ("8bit", "float32", r"has mu int8\[256,128\], nu uint8.*; expected mu float32\[256,128\]"),
        (
            "4bit",
            "8bit",
            r"at block/0/kernel the state has mu nothing.*; expected mu int8\[256,128\]",
        ),
        ("bfloat16", "8bit", r"has mu bfloat16\[256,128\].*; expected mu int8\[256,128\]"),
        ("8bit", "bfloat16", r"has mu int8\[256,128\].*; expected mu bfloat16\[256,128\]"),
    ],
)
def test_a_state_of_another_format(made, used, message):
    state = adamfn.adam(moments=made).init(PARAMS)
    with pytest.raises(ValueError, match=message):
        adamfn.adam(moments=used).update(PARAMS, state)


def test_gradients_of_another_shape():
    tx = adamfn.adam(moments="8bit")
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"mu differ at \['table'\]: found float32\[3,3\]"):
        tx.update(PARAMS | {"table": jnp.ones((3, 3))}, state)
    with pytest.raises(ValueError, match="scale_by_moments: at table the state has mu int8"):
        tx.update(PARAMS | {"table": jnp.ones((256, 128))}, state)
    with pytest.raises(ValueError, match=r"differ at \['table'\]: found nothing"):
        tx.update({k: v for k, v in PARAMS.items() if k != "table"}, state)


@pytest.mark.parametrize("moments", LEAN)
def test_a_python_number_beside_lean_leaves(moments):
    tx = adamfn.adam(moments=moments)
    params = {"w": jnp.ones((128, 256)), "scale": 1.0}
    updates, _ = tx.update(params, tx.init(params))
    np.testing.assert_allclose(updates["scale"], -1e-3, rtol=1e-6)


@dataclass(frozen=True)
class Everything(formats.BaseFormat, HalfPrecision):
    stores_rows = True

    def holds(self, shape, dtype):
        return True


def test_a_scalar_can_rest_in_a_format_of_the_users_own():
    tx = adamfn.lazy_adam(moments=Everything())
    params = {"scalar": jnp.ones(()), "row": jnp.ones(3)}
    _, state = tx.update(params, tx.init(params))
    _, after = tx.update(jax.tree.map(jnp.zeros_like, params), state)
    same(after[0]._replace(count=1), state[0])


class NotHashable(HalfPrecision):
    __hash__ = None


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        (
            formats.Linear(),
            r"a codec of one moment; expected a format of both, such as Pair\(mu=Lin",
        ),
        (NotHashable(), r"which cannot be hashed; .* @dataclass\(frozen=True\)"),
    ],
    ids=["codec", "unhashable"],
)
def test_what_is_nearly_a_format(moments, message):
    with pytest.raises(TypeError, match=message):
        adamfn.adam(moments=moments)


@pytest.mark.parametrize(
    ("mu", "nu", "message"),
    [
        ("8bit", formats.Exact(), "Pair: mu is '8bit'; expected a codec of one moment"),
        (formats.Exact(), formats.Factored, "Pair: nu is <class .*Factored'>; expected a codec"),
        (formats.Exact(), formats.EightBit(), "Pair: nu is EightBit.*; expected a codec of one"),
        (formats.BlockMean(), formats.Exact(), "Pair: mu is BlockMean.*, which keeps means alone"),
        (formats.Factored(), formats.Exact(), "Pair: mu is Factored.*, which keeps means alone"),
    ],
    ids=["name", "class", "format", "blockmean", "factored"],
)
def test_a_pair_that_makes_no_sense(mu, nu, message):
    with pytest.raises((TypeError, ValueError), match=message):
        formats.Pair(mu, nu)


def test_an_axis_to_average_over_that_is_none():
    third = formats.Pair(formats.Exact(), formats.BlockMean(axis=2))
    assert adamfn.adam(moments=third).init(jnp.ones((64, 64)))[0].nu.shape == (64, 64)
    state = adamfn.adam(moments=third).init(jnp.ones((64, 64, 2)))
    assert jax.tree.leaves(state[0].scales)[0].shape == (64, 64, 1)
    with pytest.raises(ValueError, match=r"BlockMean: axis is 1\.5; expected an integer"):
        formats.BlockMean(axis=1.5)


@pytest.mark.parametrize("params", [{}, {"frozen": None}])
def test_describe_says_that_there_is_nothing(params):
    with pytest.raises(ValueError, match="describe: found no moments in a tuple"):
        formats.describe(adamfn.adam(moments="8bit").init(params))


def test_an_error_about_a_leaf_that_is_the_whole_tree():
    with pytest.raises(ValueError, match="the leaf at the root stores several rows"):
        adamfn.lazy_adam(moments="factored").init(PARAMS["table"])
    state = adamfn.adam().init(PARAMS["table"])
    with pytest.raises(ValueError, match="at the root the state has mu float32"):
        adamfn.adam(moments="8bit").update(PARAMS["table"], state)


def test_an_integer_leaf():
    with pytest.raises(TypeError, match=r"params: the leaf at \['table'\] is int32"):
        adamfn.adam(moments="8bit").init(PARAMS | {"table": jnp.ones((128, 256), int)})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_a_state_that_was_cast_is_refused(dtype, moments):
    # Rounded to nearest, nu would stand still without a word.
    tx, params = adamfn.adam(1e-3, moments=moments), {"w": jnp.ones((4, 3))}
    state = jax.tree.map(
        lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, tx.init(params)
    )
    for step in (tx.update, partial(adamfn.step, tx)):
        with pytest.raises(
            ValueError, match=r"at w the state has mu b?float16.*; expected mu float32"
        ):
            step(params, state, params)


@pytest.mark.parametrize("count", [1.0, "1", jnp.float32(1), jnp.uint32(1), jnp.zeros(2, int)])
def test_a_count_that_is_no_int32_is_refused(count):
    tx, params = adamfn.adam(1e-3), jnp.ones(2)
    moments, *others = tx.init(params)
    for step in (tx.update, partial(adamfn.step, tx)):
        with pytest.raises(TypeError, match=r"scale_by_moments: the state's count is .* int32\[\]"):
            step(params, (moments._replace(count=count), *others), params)
