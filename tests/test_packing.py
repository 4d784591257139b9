# SPDX-License-Identifier: Apache-2.0
"""Packed leaves: the same updates, states that move to the plain ones and back, and refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamfn
from adamfn.chains.packed import Packed

SHAPES = {"large": (200, 300), "vectors": [(1,), (33,), (0,), (1000,)], "scalar": ()}


def tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), dtype),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    ) | {"nothing": None}


def matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


CHAINS = {
    "adam": adamfn.adam(0.1),
    "adamw": adamfn.adamw(lambda count: 0.1 / (1 + count), weight_decay=0.1, mask=matrices),
    "amsgrad": adamfn.amsgrad(0.1),
    "nadam": adamfn.nadam(0.1),
    "adamax": adamfn.adamax(0.1),
    "nested": adamfn.chain(adamfn.chain(adamfn.scale_by_moments()), adamfn.scale_by_lr(0.1)),
    "uncounted": adamfn.chain(adamfn.bias_correct(), adamfn.scale_by_lr(0.1)),
}


# On CPU "auto" is native code for Adam, and XLA for all else.
@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "auto") for name in CHAINS), ("adamw", "xla")]
)
def test_packed_is_plain(name, backend):
    plain, packed = CHAINS[name], adamfn.packed(CHAINS[name])
    steps = [adamfn.with_backend(tx, backend) for tx in (plain, packed)]
    params = [tree(0)] * 2
    states = [plain.init(params[0]), packed.init(params[0])]
    assert any(isinstance(x, Packed) for x in jax.tree.leaves(states[1], is_leaf=is_packed)) == (
        name != "uncounted"
    )
    jitted = [jax.jit(partial(adamfn.step, tx)) for tx in steps]
    for seed in (1, 2, 3):
        updates = [
            tx.update(tree(seed), s, params[0])[0] for tx, s in zip(steps, states, strict=True)
        ]
        # The same operations, contracted by a compiler in another way: two roundings.
        jax.tree.map(partial(np.testing.assert_allclose, rtol=3e-7, atol=1e-12), *updates)
        params, states = zip(
            *(step(tree(seed), s, p) for step, s, p in zip(jitted, states, params, strict=True)),
            strict=True,
        )
        jax.tree.map(partial(np.testing.assert_allclose, rtol=3e-7, atol=2e-7), *params)
    back = adamfn.repack(packed, states[1], params[0])
    assert jax.tree.structure(back) == jax.tree.structure(states[0])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=3e-7, atol=1e-12), back, states[0])
    again = adamfn.repack(packed, back, params[0])
    jax.tree.map(np.testing.assert_array_equal, again, states[1])


def is_packed(node):
    return isinstance(node, Packed)


@pytest.mark.parametrize("backend", ["auto", "xla"])
def test_mixed_dtypes_in_one_buffer(backend):
    params = {"a": jnp.ones(5), "b": jnp.ones(7, jnp.bfloat16), "c": jnp.ones((2, 3))}
    grads = {"a": jnp.ones(5, jnp.bfloat16), "b": jnp.ones(7), "c": jnp.ones((2, 3))}
    plain = adamfn.adamw(0.1)
    packed = adamfn.with_backend(adamfn.packed(plain), backend)
    state, own = packed.init(params), plain.init(params)
    for advance in (
        lambda tx, s: tx.update(grads, s, params)[0],
        lambda tx, s: adamfn.step(tx, grads, s, params)[0],
    ):
        found, expected = advance(packed, state), advance(plain, own)
        for name in params:
            assert found[name].dtype == expected[name].dtype
            np.testing.assert_allclose(
                np.asarray(found[name], np.float32), np.asarray(expected[name], np.float32), 3e-7
            )


def test_the_structure_follows_from_shapes_and_masks_alone():
    tx = adamfn.packed(CHAINS["adamw"])
    state = tx.init(tree(0))
    for other in (jax.jit(tx.init)(tree(0)), jax.eval_shape(tx.init, tree(0))):
        assert jax.tree.structure(other) == jax.tree.structure(state)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), other) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
    # What decays is apart from what does not; no matrix is small.
    assert [buffer.size for buffer in state[0].mu.buffers] == [1035]
    assert state[0].mu.leaves["large"].shape == (200, 300)
    everything = adamfn.packed(CHAINS["adamw"], below=10**6).init(tree(0))
    assert [buffer.size for buffer in everything[0].mu.buffers] == [60000, 1035]


def test_a_thousand_leaves_are_one_call():
    params = {f"{k:03}": jnp.ones(100) for k in range(1000)}
    tx = adamfn.packed(adamfn.adam())
    jaxpr = jax.make_jaxpr(partial(adamfn.step, tx))(params, tx.init(params), params)
    assert sum(eqn.params.get("name") == "bind" for eqn in jaxpr.eqns) == 1
    assert len(jax.tree.leaves(tx.init(params))) == 35


def test_optax_maps_its_parameters():
    tx = adamfn.packed(adamfn.adamw())
    named = optax.tree.map_params(
        tx, lambda x: "parameter", tx.init(tree(0)), transform_non_params=lambda x: "other"
    )
    assert named[0].mu.leaves["large"] == named[0].nu.leaves["large"] == "parameter"
    assert named[0].count == named[0].mu.buffers == "other"


def test_around_it_goes_what_is_not_ours():
    inner = adamfn.packed(adamfn.adamw(0.1))
    tx = adamfn.chain(optax.clip_by_global_norm(1.0), inner)
    plain = adamfn.chain(optax.clip_by_global_norm(1.0), adamfn.adamw(0.1))
    params, _ = adamfn.step(tx, tree(1), tx.init(tree(0)), tree(0))
    expected, _ = adamfn.step(plain, tree(1), plain.init(tree(0)), tree(0))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=3e-7, atol=1e-7), params, expected)


def refuse_to_step(state):
    return adamfn.packed(adamfn.adam()).update(tree(1), state)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: adamfn.packed(optax.adam(1.0)), ValueError, "which is not an adamfn stage"),
        (
            lambda: adamfn.packed(adamfn.chain(optax.clip(1.0), adamfn.adam())),
            ValueError,
            "which is not an adamfn stage. Put it around",
        ),
        (
            lambda: adamfn.packed(adamfn.adam(moments="8bit")),
            ValueError,
            "scale_by_moments has moments='8bit', and small leaves",
        ),
        (
            lambda: adamfn.packed(adamfn.lazy_adam()),
            ValueError,
            "scale_by_lazy_moments needs a statistic of each leaf",
        ),
        (lambda: adamfn.packed(adamfn.adam), TypeError, "Call the factory first"),
        (lambda: adamfn.packed(adamfn.adam(), below="a"), TypeError, "below is 'a'; expected"),
        (
            lambda: refuse_to_step(adamfn.adam().init(tree(0))),
            ValueError,
            "updates and mu differ at the root: found a Packed, .* adamfn.repack converts",
        ),
        (
            lambda: refuse_to_step(adamfn.packed(adamfn.adam()).init({**tree(0), "more": 1.0})),
            ValueError,
            r"updates and mu differ at \.buffers\[0\]: found float32\[1035\], .*\[1036\].* Pass g",
        ),
        (
            lambda: adamfn.repack(adamfn.adam(), (), tree(0)),
            TypeError,
            "repack: the first argument is .*; expected the result of `packed`",
        ),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()
