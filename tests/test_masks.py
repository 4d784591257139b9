# SPDX-License-Identifier: Apache-2.0
"""adamfn.masks: matrices and names, in every library's containers."""

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import adamfn
from adamfn.trees import path_name


def chosen(mask, params):
    return {path_name(path) for path, yes in jax.tree.leaves_with_path(mask(params)) if yes}


def test_plain_trees():
    params = {
        "token_embedding": jnp.ones((9, 4)),
        "layers": [
            {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)},
            {"conv": jnp.ones((3, 3, 4, 4))},
        ],
        "norm": {"w": jnp.ones((1, 4))},
        "Attention": {"BIAS": jnp.ones((2, 4))},
        "none": None,
    }
    assert chosen(adamfn.masks.matrices(), params) == {"layers/0/kernel", "layers/1/conv"}
    assert "token_embedding" in chosen(adamfn.masks.matrices(but=["bias"]), params)
    assert chosen(adamfn.masks.named("conv", "attention"), params) == {
        "layers/1/conv",
        "Attention/BIAS",
    }


def test_linen():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            x = linen.Embed(9, 8)(tokens)
            x = linen.LayerNorm()(x)
            x = linen.MultiHeadDotProductAttention(2)(x)
            return linen.Dense(3)(x)

    params = Model().init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    found = chosen(adamfn.masks.matrices(), params)
    attention = "MultiHeadDotProductAttention_0"
    kernels = {f"{attention}/{name}/kernel" for name in ("query", "key", "value", "out")}
    assert found == {"Dense_0/kernel", *kernels}


def test_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(9, 8, rngs=rngs)
            self.norm = nnx.RMSNorm(8, rngs=rngs)
            self.dense = nnx.Linear(8, 3, rngs=rngs)

    params = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    assert chosen(adamfn.masks.matrices(), params) == {"dense/kernel"}
    tx = adamfn.adamw(0.1, weight_decay=0.5, mask=adamfn.masks.matrices())
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    moved = {path_name(path) for path, u in jax.tree.leaves_with_path(updates) if jnp.any(u != 0)}
    assert moved == {"dense/kernel"}


def test_equinox():
    class Model(eqx.Module):
        embedding: eqx.nn.Embedding
        layers: eqx.nn.Linear
        norm: eqx.nn.LayerNorm

        def __init__(self, key):
            self.embedding = eqx.nn.Embedding(9, 8, key=key)
            keys = jax.random.split(key, 3)
            self.layers = eqx.filter_vmap(lambda k: eqx.nn.Linear(8, 8, key=k))(keys)
            self.norm = eqx.nn.LayerNorm(8)

    params = eqx.filter(Model(jax.random.key(0)), eqx.is_inexact_array)
    assert chosen(adamfn.masks.matrices(but=["embed"]), params) == {"layers/weight", "layers/bias"}
    mask = adamfn.masks.matrices(but=["embed"], stacked=["layers"])
    assert chosen(mask, params) == {"layers/weight"}


def test_in_optax():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    tx = optax.masked(optax.scale(0.0), adamfn.masks.matrices())
    updates, _ = tx.update(params, tx.init(params))
    assert jnp.all(updates["kernel"] == 0)
    assert jnp.all(updates["bias"] == 1)


def test_matching_searches_paths():
    params = {"layers": [{"kernel": 1.0, "bias": 1.0}, {"kernel": 1.0}], "head": {"kernel": 1.0}}
    found = chosen(adamfn.masks.matching(r"layers/\d+/kernel$"), params)
    assert found == {"layers/0/kernel", "layers/1/kernel"}
    assert chosen(adamfn.masks.matching("^head", "1/"), params) == {
        "head/kernel",
        "layers/1/kernel",
    }
    with pytest.raises(ValueError, match="matching: no leaf has 'KERNEL' in its path"):
        adamfn.masks.matching("kernel", "KERNEL")(params)
    assert chosen(adamfn.masks.matching(), params) == set()


def test_rates_fall_with_depth():
    def block():
        return {"kernel": jnp.ones((2, 2)), "none": None}

    params = {
        "token_embed": jnp.ones(2),
        "norm": jnp.ones(2),
        **{f"block_{k}": block() for k in (0, 1, 10)},
    }
    factors = adamfn.masks.layerwise_decay(0.5, r"block_(\d+)")(params)
    assert jax.tree.structure(factors) == jax.tree.structure(params)
    assert factors["norm"] == 1
    assert [factors[f"block_{k}"]["kernel"] for k in (10, 1, 0)] == [2**-1, 2**-10, 2**-11]
    assert factors["token_embed"] == 2**-12


def test_stacked_layers_have_a_factor_each():
    params = {"embed": jnp.ones(2), "layers": {"w": jnp.ones((3, 2, 4)), "b": jnp.ones((3, 4))}}
    factors = adamfn.masks.layerwise_decay(0.5, stacked=["layers"])(params)
    assert factors["embed"] == 1 / 16
    for name, shape in (("w", (3, 1, 1)), ("b", (3, 1))):
        assert factors["layers"][name].shape == shape
        assert factors["layers"][name].ravel().tolist() == [1 / 8, 1 / 4, 1 / 2]
    by_layer = optax.stateless(lambda us, p: jax.tree.map(jnp.multiply, us, factors))
    tx = adamfn.chain(adamfn.adam(1.0, eps=0.0), by_layer)
    moved, _ = adamfn.step(tx, params, tx.init(params), params)
    assert jnp.allclose(moved["layers"]["b"], 1 - factors["layers"]["b"], atol=1e-6)


def test_arguments_of_paths():
    with pytest.raises(ValueError, match=r"matching is '\[', which is no regular expression"):
        adamfn.masks.matching("[")
    with pytest.raises(TypeError, match="matching is 3; expected a regular expression"):
        adamfn.masks.matching(3)
    with pytest.raises(ValueError, match="and one group, of the index"):
        adamfn.masks.layerwise_decay(0.5, "layer")
    with pytest.raises(ValueError, match=r"decay is 0 and layers .* a number above 0"):
        adamfn.masks.layerwise_decay(0)
    with pytest.raises(ValueError, match=r"found no layer by .* such paths as 'w'"):
        adamfn.masks.layerwise_decay(0.5)({"w": 1.0})
    assert adamfn.masks.layerwise_decay(0.5)({}) == {}


PARAMS = {"layers": {"kernel": jnp.ones((2, 2, 2)), "bias": jnp.ones(2)}, "head": jnp.ones((2, 2))}


@pytest.mark.parametrize(
    "make",
    [
        lambda: adamfn.masks.matrices("bias"),
        lambda: adamfn.masks.matrices(PARAMS),  # its keys are strings
        lambda: adamfn.masks.matrices(stacked={"layers": 1}),
        lambda: adamfn.masks.matrices(None),
        lambda: adamfn.masks.named(3),
        lambda: adamfn.masks.named(PARAMS),
    ],
)
def test_names_are_a_list(make):
    with pytest.raises(
        TypeError, match=r"(but|stacked|named) is .*; expected names, a list of strings"
    ):
        make()


@pytest.mark.parametrize(
    "mask",
    [
        adamfn.masks.named("head", "kernle"),
        adamfn.masks.matrices(["kernle"]),
        adamfn.masks.matrices(["bias", "norm"], ["kernle"]),
        adamfn.masks.matching("kernel$", "kernle"),
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda mask: adamfn.adamw(mask=mask),
        lambda mask: adamfn.chain(adamfn.scale_by_moments(), adamfn.clip_updates(stacked=mask)),
        lambda mask: adamfn.add_corrected_decay(0.1, 0.1, 0.1, mask),
        lambda mask: optax.adamw(0.1, mask=mask),
    ],
)
def test_a_name_that_no_leaf_has_is_refused(make, mask):
    with pytest.raises(ValueError, match=r"no leaf has 'kernle' in its path; .*'layers/kernel'"):
        make(mask).init(PARAMS)


def test_a_name_may_be_of_a_leaf_in_another_group():
    groups = {"layers": "a", "head": "b"}
    tx = optax.partition(
        {group: adamfn.adamw(mask=adamfn.masks.named("head", "bias")) for group in "ab"}, groups
    )
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    frozen = {**PARAMS, "head": None}
    assert chosen(adamfn.masks.named("head", "bias"), frozen) == {"layers/bias"}
    assert adamfn.adamw(mask=adamfn.masks.named("head")).init({})


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda path, leaf: leaf.ndim > 1, "missing 1 required positional argument: 'leaf'"),
        (lambda leaf: leaf.ndim > 1, "'dict' object has no attribute 'ndim'"),
        (lambda leaf: jnp.ndim(leaf) > 1, "False of the tree, and True of a leaf"),
        (adamfn.masks.named, "named is .*; expected names"),
        (adamfn.masks.matrices, "but is .*; expected names"),
        ("head", "the mask at the root is 'head'; expected True or False"),
        (
            {"layers": True, "head": "yes"},
            r"the mask at \['head'\] is 'yes'; expected True or False",
        ),
    ],
)
def test_what_is_no_mask_is_refused(mask, message):
    with pytest.raises(TypeError, match=f"add_decayed_weights: .*{message}"):
        adamfn.adamw(mask=mask).init(PARAMS)
    with pytest.raises(ValueError, match="not that of the parameters, nor a prefix"):
        adamfn.adamw(mask={"layers": True}).init(PARAMS)
