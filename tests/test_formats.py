# SPDX-License-Identifier: Apache-2.0
"""Formats: what they keep of the moments, what they cost, and what they do with odd numbers."""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adamfn import formats
from adamfn.formats import FORMATS, blocks
from adamfn.formats.bits import nearest
from adamfn.formats.noise import dither, threshold

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import model_trees

NAMES = list(FORMATS)
PER_ELEMENT = ["float32", "bfloat16", "8bit", "4bit"]
FLOAT32 = FORMATS["float32"]
TINY = np.float32(2.0**-126)


def format_of(leaf, name):
    return FORMATS[name] if FORMATS[name].holds(leaf.shape, leaf.dtype) else FLOAT32


def zeros(fmt, shape):
    x = jnp.zeros(shape)
    stored = jax.eval_shape(lambda: fmt.encode(x, x, None))
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), stored)


def nbytes(stored):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stored))


def adam(fmt, g, stored, noise, count, b2=0.999):
    m, v = fmt.decode(stored)
    m, v = m + (1 - 0.9) * (g - m), v + (1 - b2) * (g * g - v)
    c1, c2 = -jnp.expm1(count * np.log(0.9)), -jnp.expm1(count * np.log(b2))
    u = m / (jnp.sqrt(v) + 1e-8 * jnp.sqrt(c2)) * (jnp.sqrt(c2) / c1)
    return u, fmt.encode(m, v, noise)


@partial(jax.jit, static_argnums=0)
def encode(fmt, mu, nu):
    return fmt.encode(mu, nu, None)


@partial(jax.jit, static_argnums=0)
def encode_and_decode(fmt, mu, nu, noise):
    return fmt.decode(fmt.encode(mu, nu, noise))


def roundtrip(name, mu, nu, noise=None):
    mu, nu = jnp.asarray(mu, jnp.float32), jnp.asarray(nu, jnp.float32)
    mu, nu = encode_and_decode(FORMATS[name], mu, nu, noise)
    assert mu.dtype == nu.dtype == jnp.float32
    return np.asarray(mu), np.asarray(nu)


def moments(shape, decades=2.0, seed=0):
    rng = np.random.default_rng(seed)
    g = 10 ** -rng.uniform(0, decades, shape) * np.sign(rng.standard_normal(shape))
    return (rng.uniform(0.1, 1, shape) * g).astype(np.float32), (g**2).astype(np.float32)


@partial(jax.jit, static_argnames=("named", "steps"))
def stress(named, decades, seed=0, steps=1500):
    """The last updates after noisy steps, by format: gradients of many sizes in each block."""
    shape, formats_of = (64, 256), {"exact": FLOAT32, **dict(named)}
    sizes, gradients = jax.random.split(jax.random.key(seed))
    size = 10.0 ** (-decades * jax.random.uniform(sizes, shape))

    def step(carry, count):
        g = size * jax.random.normal(jax.random.fold_in(gradients, count), shape)
        noise, t = formats.noise(count, seed, shape), count.astype(jnp.float32)
        return {
            name: adam(formats_of[name], g, stored, noise, t) for name, (_, stored) in carry.items()
        }, None

    start = {name: (jnp.zeros(shape), zeros(fmt, shape)) for name, fmt in formats_of.items()}
    last, _ = jax.lax.scan(step, start, jnp.arange(1, steps + 1))
    return {name: update for name, (update, _) in last.items()}


BOUNDS = {  # of the cosine, the length and the largest entry, for 1, 2 and 4 decades
    "bfloat16": [(0.9997, 0.003, 1.05), (0.9997, 0.003, 1.05), (0.9997, 0.003, 1.05)],
    "8bit": [(0.9982, 0.01, 1.2), (0.9966, 0.02, 1.3), (0.9930, 0.03, 1.5)],
    "4bit": [(0.93, 0.06, 2.5), (0.90, 0.07, 3.0), (0.84, 0.09, 4.0)],
}


@pytest.mark.optimized  # a long loop
@pytest.mark.parametrize(("place", "decades"), [(0, 1), (1, 2), (2, 4)])
def test_updates_stay_near_those_of_float32(place, decades):
    found = stress(tuple((name, FORMATS[name]) for name in BOUNDS), decades)
    found = {name: np.asarray(update, np.float64).ravel() for name, update in found.items()}
    exact = found["exact"]
    for name, bounds in BOUNDS.items():
        (cosine, length, largest), u = bounds[place], found[name]
        assert u @ exact / np.linalg.norm(u) / np.linalg.norm(exact) >= cosine, name
        assert abs(np.linalg.norm(u) / np.linalg.norm(exact) - 1) <= length, name
        assert np.abs(u).max() <= largest, name  # float32's is 0.95


@pytest.mark.optimized  # a long loop
def test_bfloat16_to_nearest_lets_nu_stop():
    # Why rounding is stochastic: the same test to nearest is not within its bounds.
    nearest = formats.Pair(formats.Rounded(stochastic=False), formats.Rounded(stochastic=False))
    found = stress((("nearest", nearest),), 1)
    assert np.linalg.norm(found["nearest"]) < 0.97 * np.linalg.norm(found["exact"])


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("float32", 8),
        ("bfloat16", 4.01),
        ("8bit", 2.06),
        ("4bit", 1.105),
        ("factored", 1.04),
        ("blockmean", 1.04),
    ],
)
def test_bytes_a_parameter(name, bound):
    leaves = jax.tree.leaves(model_trees.abstract(model_trees.gpt2_small()))
    states = [
        jax.eval_shape(lambda x: format_of(x, name).encode(x, x, None), leaf) for leaf in leaves
    ]
    assert nbytes(states) <= bound * sum(leaf.size for leaf in leaves)


@pytest.mark.optimized  # a long loop
@pytest.mark.parametrize("name", ["bfloat16", "8bit"])
def test_rounding_is_unbiased(name):
    mu, nu = (jnp.asarray(x) for x in moments((4, 300), seed=3))
    draws = 4096
    unit = jnp.sqrt(nu), nu  # about in proportion to the distance between levels

    def draw(sums, count):
        kept = FORMATS[name].decode(FORMATS[name].encode(mu, nu, formats.noise(count, 0, mu.shape)))
        errors = [(k - x) / u for k, x, u in zip(kept, (mu, nu), unit, strict=True)]
        return [(s + e, q + e**2) for (s, q), e in zip(sums, errors, strict=True)], None

    sums, _ = jax.jit(lambda: jax.lax.scan(draw, [(0 * mu, 0 * mu)] * 2, jnp.arange(draws)))()
    for total, square in sums:
        mean = np.asarray(total, np.float64) / draws
        variance = np.asarray(square, np.float64) / draws - mean**2
        assert variance.max() > 0
        # In standard errors. Where a level is hit but a few times in all, of the others' size.
        z = mean / np.sqrt(np.maximum(variance, 0.1 * variance.mean()) / draws)
        assert np.abs(z).max() < 5
        assert abs(z.mean()) < 4.5 / z.size**0.5


def test_linear_rounding_is_unbiased():
    x = moments((1, 300))[0]
    bits = jnp.asarray(np.broadcast_to(np.arange(8, 2**16, 16)[:, None], (4096, 300)), jnp.int32)
    codec = formats.Linear()
    stored = codec.encode(jnp.broadcast_to(x, bits.shape), bits)
    mean = np.asarray(codec.decode(*stored), np.float64).mean(axis=0)
    assert np.abs(mean - x).max() <= np.asarray(stored.scales).max() / 4096


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-37])
def test_linear_stores_as_zero_what_has_no_scale(size):
    # The scale would be a denormal, and its reciprocal infinite.
    codec, x = formats.Linear(), jnp.array([size, 0.0, -size])
    stored = jax.jit(codec.encode)(x, None)
    np.testing.assert_array_equal(stored.codes, 0)
    np.testing.assert_array_equal(codec.decode(*stored), 0)


def test_bfloat16_takes_every_sixteen_bits_once():
    x = jnp.array([1.0 + 2**-9, -3.0e-5, 7.1e20])[:, None]
    rounded, _ = formats.Rounded().encode(
        jnp.broadcast_to(x, (3, 2**16)), jnp.broadcast_to(jnp.arange(2**16), (3, 2**16))
    )
    mean = np.asarray(rounded, np.float64).mean(axis=1)
    np.testing.assert_allclose(mean, np.asarray(x[:, 0], np.float64), rtol=1e-12)


def test_four_bits_round_nu_to_the_right_logarithm_on_average():
    _, nu = moments((4, 256), decades=1)
    kept = jax.lax.map(
        lambda i: encode_and_decode(FORMATS["4bit"], nu, nu, formats.noise(i, 0, nu.shape))[1],
        jnp.arange(400),
    )
    error = np.mean(np.log2(kept), axis=0) - np.log2(nu)
    assert np.abs(error).max() < 0.2  # levels are 0.4 octaves apart; linear within an octave: 0.09
    assert abs(error.mean()) < 0.05


@pytest.mark.parametrize("name", PER_ELEMENT)
@pytest.mark.parametrize(
    "shape", [(4, 256), (3, 100), (2, 257), (5, 511), (2, 3, 130), (3, 640), (1, 1)]
)
def test_shapes_that_are_no_multiple_of_a_block(name, shape):
    mu, nu = moments(shape, decades=1, seed=1)
    stored = encode(FORMATS[name], mu, nu)
    if name in ("8bit", "4bit"):
        assert stored.nu.shape == shape  # not filled up
        size = blocks.size_for(shape[-1], {"8bit": 256, "4bit": 128}[name])
        assert stored.scales.top.shape == (*shape[:-1], -(-shape[-1] // size))
    kept = roundtrip(name, mu, nu)
    ratio = {"float32": 1, "bfloat16": 1.004, "8bit": 1.02, "4bit": 1.3}[name]
    assert kept[0].shape == kept[1].shape == shape
    np.testing.assert_array_less(np.abs(np.log(kept[1] / nu)), np.log(ratio) + 1e-6)
    step = {"float32": 0, "bfloat16": 0.004, "8bit": 0.03, "4bit": 0.4}[name]
    np.testing.assert_array_less(np.abs(kept[0] - mu), step * np.sqrt(nu) + 1e-6 * np.abs(mu))


def test_a_block_needs_the_least_padding():
    # Of the multiples of 16 from 128 to 256.
    assert [blocks.size_for(n, 256) for n in (208, 1048, 130, 100)] == [208, 176, 144, 128]


@pytest.mark.parametrize("shape", [(128, 300), (300, 128), (2, 128, 3, 200), (150, 150, 2)])
def test_factored_is_exact_for_an_outer_product(shape):
    a, b = (i for i, n in enumerate(shape) if n >= 128)
    rng = np.random.default_rng(0)
    rows, columns = (
        10 ** rng.uniform(-19, -16, [n if i != k else 1 for i, n in enumerate(shape)])
        for k in (a, b)
    )
    nu = jnp.asarray(rows * columns * 1e8, jnp.float32)
    codec = formats.Factored()
    stored = codec.encode(nu, None)
    assert stored.scales.rows.size == nu.size // shape[b]
    assert stored.scales.columns.size == nu.size // shape[a]
    np.testing.assert_allclose(codec.decode(*stored), nu, rtol=1e-5)


def test_factored_keeps_the_means_and_zeros():
    nu = np.random.default_rng(0).chisquare(1, (128, 256)).astype(np.float32)
    nu[3] = nu[:, 5] = 0
    codec = formats.Factored()
    kept = np.asarray(codec.decode(*codec.encode(jnp.asarray(nu), None)))
    np.testing.assert_allclose(kept.mean(0), nu.mean(0), rtol=1e-5)
    np.testing.assert_allclose(kept.mean(1), nu.mean(1), rtol=1e-5)
    assert (kept[3] == 0).all()
    assert (kept[:, 5] == 0).all()
    assert not np.any(np.asarray(codec.decode(*codec.encode(jnp.zeros((128, 256)), None))))


@pytest.mark.parametrize("axis", [-1, -2])
def test_blockmean_averages_along_its_axis(axis):
    mu, nu = moments((64, 128))
    fmt = formats.Pair(formats.Exact(), formats.BlockMean(axis))
    kept_mu, kept_nu = fmt.decode(fmt.encode(jnp.asarray(mu), jnp.asarray(nu), None))
    np.testing.assert_array_equal(kept_mu, mu)
    expected = np.broadcast_to(nu.mean(axis, keepdims=True), nu.shape)
    np.testing.assert_allclose(kept_nu, expected, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_stored_zeros_are_zero_moments(name):
    shape = (128, 256)
    for stored in (
        zeros(FORMATS[name], shape),
        encode(FORMATS[name], *jnp.zeros((2, *shape))),
    ):
        kept = jax.jit(FORMATS[name].decode)(stored)
        assert not any(np.any(np.asarray(x)) for x in kept)


@pytest.mark.parametrize("name", PER_ELEMENT)
def test_zero_stays_zero_and_nothing_else_becomes_zero(name):
    mu, nu = moments((64, 256), decades=15)
    nu[::2, ::3] = mu[::2, ::3] = 0
    for i in range(20):
        kept_mu, kept_nu = roundtrip(name, mu, nu, formats.noise(i, 0, nu.shape))
        np.testing.assert_array_equal(kept_nu == 0, nu == 0)
        assert (kept_mu[nu == 0] == 0).all()
        assert np.isfinite(kept_mu).all()
        assert np.isfinite(kept_nu).all()


def test_states_of_0_2_0_keep_their_mu_beside_means_of_nu():
    """Their scales are those of mu itself, and positive."""
    for name in ("factored", "blockmean"):
        mu, nu = moments((128, 256), decades=1)
        stored = encode(FORMATS[name], mu, nu)
        assert np.all(np.asarray(stored.scales[0]) < 0)
        codes, scale = formats.Linear().encode(jnp.asarray(mu), None)
        kept, _ = FORMATS[name].decode(formats.Stored(codes, None, (scale, stored.scales[1])))
        np.testing.assert_array_equal(kept, formats.Linear().decode(codes, scale))


@pytest.mark.parametrize(("name", "octaves"), [("4bit", 40), ("8bit", 48)])
def test_levels_span_so_many_octaves_below_the_largest(name, octaves):
    nu = np.where(np.arange(128) == 5, np.float32(2.0**-100), np.float32(1.5))
    _, kept = roundtrip(name, 1e-3 * np.sqrt(nu), nu)
    # The distance of levels is rounded up, by one in the last place for each of 254 at most.
    expected = np.where(nu < 1, 1.5 * 2.0**-octaves, 1.5)
    np.testing.assert_allclose(kept, expected, rtol=254 * 2.0**-23)
    nu[7] = np.inf  # which spans all of float32: 255 octaves, one for each level
    _, kept = roundtrip(name, 1e-3 * np.sqrt(nu), nu)
    number = {"4bit": 16, "8bit": 254}[name]
    np.testing.assert_array_less(abs(np.log2(np.delete(kept / nu, 7))), 255 / number)


def test_elements_whose_gradients_stop_spare_the_others():
    """Their nu fades, which once took the others' levels. Gradients may come again."""
    shape, steps, names = (8, 256), 1000, ("float32", "8bit")
    stopped = np.arange(256) % 64 == 5

    def step(carry, count):
        g = jax.random.normal(jax.random.fold_in(jax.random.key(0), count), shape)
        g = jnp.where(stopped & (count > 10) & (count <= steps - 5), 0, g)
        noise, t = formats.noise(count, 0, shape), count.astype(jnp.float32)
        found = [adam(FORMATS[name], g, carry[name], noise, t, b2=0.95) for name in names]
        return {name: kept for name, (_, kept) in zip(names, found, strict=True)}, [
            u for u, _ in found
        ]

    start = {name: zeros(FORMATS[name], shape) for name in names}
    _, trails = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(1, steps + 1)))()
    exact, lean = (np.asarray(trail, np.float64) for trail in trails)
    # Without a bound on the span the first two are 0.993 and 1.03.
    for at, where, least, longest in ((-6, ~stopped, 0.996, 1.016), (-1, stopped, 0.999, 1.01)):
        a, b = exact[at][:, where], lean[at][:, where]
        assert np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b) > least
        assert abs(np.linalg.norm(b) / np.linalg.norm(a) - 1) < longest - 1


@pytest.mark.parametrize("name", ["8bit", "4bit"])
def test_mu_without_nu_is_dropped_and_spares_its_neighbours(name):
    mu, nu = moments((1, 256))
    mu[0, 7], nu[0, 7] = 1e3, 0
    without = mu.copy()
    without[0, 7] = 0
    np.testing.assert_array_equal(roundtrip(name, mu, nu)[0], roundtrip(name, without, nu)[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.nan])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_stays_visible(name, value):
    mu, nu = moments((128, 512))
    for bits in (None, formats.noise(1, 2, mu.shape)):
        bad = nu.copy()
        bad[5, 7] = abs(value) if np.isinf(value) else value
        kept = roundtrip(name, mu, bad, bits)[1]
        assert not np.isfinite(kept[5, 7])
        if name in PER_ELEMENT:
            assert np.isfinite(np.delete(kept, 5, axis=0)).all()
            assert np.isfinite(kept[5]).sum() == 511  # only the element itself
        bad = mu.copy()
        bad[5, 7] = value
        for squares in (nu, np.where(np.arange(512) == 7, np.float32(0), nu)):
            kept = roundtrip(name, bad, squares, bits)[0]
            assert not np.isfinite(kept[5, 7])
            assert np.isfinite(kept[5, 256:]).all()  # the next block
            assert np.isfinite(np.delete(kept, 5, axis=0)).all()


@pytest.mark.parametrize("name", ["bfloat16", "8bit", "4bit"])
def test_an_infinity_beside_a_nan_stays_visible(name):
    mu, nu = moments((2, 256))
    nu[0, 3], nu[0, 9] = np.inf, np.nan
    kept = roundtrip(name, mu, nu, formats.noise(0, 0, nu.shape))[1]
    assert not np.isfinite(kept[0, [3, 9]]).any()
    assert np.isfinite(kept[1]).all()


def test_bfloat16_keeps_a_nan_whose_upper_half_is_that_of_infinity():
    nan = jax.lax.bitcast_convert_type(jnp.array([0x7F800001, -0x7FFFFF], jnp.int32), jnp.float32)
    assert np.isnan(
        np.asarray(formats.Rounded().encode(nan, jnp.zeros(2, jnp.int32)).codes, float)
    ).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_scale_of_all_gradients_changes_nothing(name):
    mu, nu = moments((128, 256))
    kept_mu, kept_nu = roundtrip(name, mu, nu)
    for scale in (2.0**-27, 2.0**17):  # 7e-9 and 1e5, of which the product is exact
        scaled_mu, scaled_nu = roundtrip(name, scale * mu, scale**2 * nu)
        np.testing.assert_allclose(scaled_mu, scale * kept_mu, rtol=1e-6)
        np.testing.assert_allclose(scaled_nu, scale**2 * kept_nu, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_denormals_and_the_ends_of_the_range(name):
    largest = np.finfo(np.float32).max
    sizes = np.array([1e-45, 1e-40, TINY, 2e-38, 1e-30, 1.0, 1e30, largest / 2**18], np.float32)
    nu = np.tile(sizes, (128, 32))
    mu = np.tile(np.sqrt(sizes), (128, 32))
    for bits in (None, formats.noise(1, 2, nu.shape)):
        kept_mu, kept_nu = roundtrip(name, mu, nu, bits)
        assert np.isfinite(kept_mu).all()
        assert np.isfinite(kept_nu).all()
        if name in ("8bit", "4bit"):
            assert (kept_nu >= TINY).all()
            assert (kept_nu <= nu.max()).all()
    for size in (1e-45, 1e-40, TINY, largest):
        kept_mu, kept_nu = roundtrip(name, np.full_like(mu, size**0.5), np.full_like(nu, size))
        if name in ("8bit", "4bit"):
            np.testing.assert_allclose(kept_nu, max(size, TINY), rtol=1e-4)
            tolerance = 0.01 if size >= TINY else 0.5
            np.testing.assert_allclose(kept_mu, size**0.5, rtol=tolerance)
        assert np.isfinite(kept_mu).all()


@pytest.mark.parametrize("name", NAMES)
def test_leaves_it_does_not_hold(name):
    fmt = FORMATS[name]
    for dtype in ("float16", "bfloat16", "float32"):
        assert fmt.holds((256, 256), jnp.dtype(dtype))
    for dtype in ("float64", "complex64", "complex128", "int32"):
        assert not fmt.holds((256, 256), jnp.dtype(dtype))
    if name != "float32":
        assert not fmt.holds((), jnp.float32)
        assert not fmt.holds((4095,), jnp.float32)
        assert not fmt.holds((15, 256), jnp.float32)
    if name in ("8bit", "4bit", "factored", "blockmean"):
        assert not fmt.holds((8192, 16), jnp.float32)
    assert fmt.holds((4096,), jnp.float32) == (name not in ("factored", "blockmean"))


def test_noise_is_uniform_and_uncorrelated():
    shape, n = (64, 1024), 65536
    base = formats.noise(1, 0, shape)
    words = {
        "itself": base,
        "next count": formats.noise(2, 0, shape),
        "next leaf": formats.noise(1, 1, shape),
        "swapped": formats.noise(0, 1, shape),
        "next element": jnp.roll(base, 1),
        "next row": jnp.roll(base, 1, axis=0),
    }
    first = [np.asarray(x, float).ravel() / 2**16 - 0.5 for x in (base >> 16, base & 0xFFFF)]
    assert abs(np.corrcoef(*first)[0, 1]) < 4.5 / n**0.5
    for name, word in words.items():
        second = [np.asarray(x, float).ravel() / 2**16 - 0.5 for x in (word >> 16, word & 0xFFFF)]
        for x in second:
            counts, _ = np.histogram(x, 256, (-0.5, 0.5))
            assert ((counts - n / 256) ** 2 / (n / 256)).sum() < 255 + 5 * 510**0.5
        if name != "itself":
            for x in first:
                for y in second:
                    assert abs(np.corrcoef(x, y)[0, 1]) < 4.5 / n**0.5
                    assert abs(np.corrcoef(x**2, y**2)[0, 1]) < 4.5 / n**0.5
    bits = np.unpackbits(np.asarray(base).view(np.uint8)).reshape(n, 32).astype(float)
    off_diagonal = np.corrcoef(bits.T) - np.eye(32)
    assert np.abs(off_diagonal).max() < 5 / n**0.5


def test_noise_over_many_counts_at_one_element():
    counts = jnp.arange(65536)
    words = jax.vmap(lambda t: formats.noise(t, 7, (4,)))(counts)
    x = np.asarray(words >> 16, float) / 2**16
    assert np.abs(x.mean(0) - 0.5).max() < 4.5 * (1 / 12) ** 0.5 / 256
    for element in range(4):
        assert abs(np.corrcoef(x[1:, element], x[:-1, element])[0, 1]) < 4.5 / 256
    assert np.abs(np.corrcoef(x.T) - np.eye(4)).max() < 4.5 / 256


def test_noise_of_two_steps_is_not_one_sequence_shifted():
    # Words that a long step shares with the starts of others by chance are not followed by more.
    long = np.asarray(formats.noise(0, 0, (2**22,)))
    starts = np.asarray(jax.vmap(lambda t: formats.noise(t, 0, (2,)))(jnp.arange(1, 8193)))
    order = np.argsort(long)
    place = order[np.searchsorted(long, starts[:, 0], sorter=order) % long.size]
    shared = long[place] == starts[:, 0]
    assert shared.any()
    assert not np.any(shared & (long[(place + 1) % long.size] == starts[:, 1]))


def test_noise_numbers_elements_in_row_major_order():
    flat = formats.noise(3, 4, (6 * 5 * 4,))
    np.testing.assert_array_equal(formats.noise(3, 4, (6, 5, 4)), flat.reshape(6, 5, 4))
    np.testing.assert_array_equal(jax.jit(partial(formats.noise, shape=(7,)))(3, 4), flat[:7])


@pytest.mark.parametrize("name", ["8bit", "4bit", "bfloat16"])
def test_no_exp_and_no_log(name):
    x = jnp.ones((32, 256))

    def both(mu, nu, noise):
        return FORMATS[name].decode(FORMATS[name].encode(mu, nu, noise))

    text = str(jax.make_jaxpr(both)(x, x, formats.noise(0, 0, x.shape)))
    assert not any(f" {op} " in text for op in ("exp", "exp2", "log", "log1p", "pow", "expm1"))


@pytest.mark.optimized  # constants that XLA adds up
def test_get():
    for name, fmt in FORMATS.items():
        assert formats.get(name) is fmt
        assert formats.get(fmt) is fmt
        assert hash(fmt) == hash(formats.get(name))
    with pytest.raises(ValueError, match="moments is '9bit'; expected one of 'float32'"):
        formats.get("9bit")
    for wrong in (8, jnp.float16, formats.EightBit, formats.Linear):
        with pytest.raises(TypeError, match="expected one of 'float32'"):
            formats.get(wrong)


def test_nearest_integers_are_rints():
    """In jit too, where XLA adds up constants that it finds side by side."""
    x = np.float32(np.concatenate([np.arange(-300, 300, 0.25), [2.0**21 + 0.5, -(2.0**22) + 1]]))
    for rounded in (nearest, jax.jit(nearest)):
        np.testing.assert_array_equal(rounded(x), np.rint(x))


def test_a_dither_is_a_threshold_about_zero():
    bits = jnp.arange(2**16)
    np.testing.assert_array_equal(threshold(bits), (np.arange(2**16) + 0.5) / 2**16)
    np.testing.assert_array_equal(dither(bits), threshold(bits) - 0.5)
    assert (threshold(None), dither(None)) == (0.5, 0.0)


@pytest.mark.parametrize("name", ["8bit", "4bit"])
def test_a_mu_that_moves_nothing_fades(name):
    """However small, down to where an inverse of its ratio to nu's root is infinite."""
    nu = np.ones((4, 1024), np.float32)
    for size in (1e-14, 1e-16, 1e-25, 1e-36, 1.2e-38):
        mu = np.float32(size) * np.linspace(-1, 1, 4096, dtype=np.float32).reshape(4, 1024)
        kept = np.asarray(roundtrip(name, mu, nu, formats.noise(1, 0, nu.shape))[0])
        if size < 2.0**-50:
            assert np.all(np.abs(kept) <= size)
        else:
            np.testing.assert_allclose(kept, mu, rtol=0, atol=size / 7)
    kept = np.asarray(roundtrip(name, 1e-25 * nu, nu, formats.noise(1, 0, nu.shape))[0])
    assert np.max(np.abs(kept)) < 1e-26
