# SPDX-License-Identifier: Apache-2.0
"""States that came back in plain containers keep their moments, and the errors say how.

Flax issue 1429 (named tuples of another class), ferminet pull 105 (a list where a tuple was), orbax
issue 487 (restored with nothing to restore into).
"""

import pickle
from functools import cache

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import adamfn
from adamfn.interop import restore

PARAMS = {"w": jnp.linspace(0, 1, 4096).reshape(16, 256), "b": [jnp.ones(3), jnp.ones(())]}
MEMBERS = {
    "adam": adamfn.adam(),
    "adamw, 8bit": adamfn.adamw(moments="8bit"),
    "amsgrad, 4bit": adamfn.amsgrad(moments="4bit"),
    "nadam, bfloat16": adamfn.nadam(moments="bfloat16"),
    "factored": adamfn.adam(moments="factored"),
    "a rate alone": adamfn.chain(adamfn.scale_by_lr(0.5)),
    "packed": adamfn.packed(adamfn.adam()),
    "wrapped": optax.MultiSteps(optax.chain(optax.clip(1.0), adamfn.adamw()), 2),
}


@cache
def run(tx):
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for _ in range(3):
        _, state = update(jax.tree.map(jnp.cos, PARAMS), state, PARAMS)
    return state


def through_msgpack(state, folder):
    return flax.serialization.msgpack_restore(flax.serialization.to_bytes(state))


def through_orbax(state, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state")  # without a target


def through_plain_tuples(state, folder):
    def plain(node):
        return tuple(map(plain, node)) if isinstance(node, tuple) else node

    return jax.tree.map(plain, state, is_leaf=lambda node: isinstance(node, tuple))


def through_lists(state, folder):
    def plain(node):
        return [*map(plain, node)] if isinstance(node, tuple) else node

    return jax.tree.map(plain, state, is_leaf=lambda node: isinstance(node, tuple))


def through_whole_paths(state, folder):
    """As safetensors keeps them: one dictionary."""
    leaves = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


def through_pickled_dictionaries(state, folder):
    def plain(node):
        if hasattr(node, "_asdict"):
            return {key: plain(part) for key, part in node._asdict().items()}
        return [*map(plain, node)] if isinstance(node, tuple | list) else node

    written = jax.tree.map(plain, state, is_leaf=lambda node: isinstance(node, tuple))
    return pickle.loads(pickle.dumps(jax.tree.map(np.asarray, written)))


WAYS = [
    through_msgpack,
    through_orbax,
    through_plain_tuples,
    through_lists,
    through_whole_paths,
    through_pickled_dictionaries,
]


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert a.dtype == b.dtype
        assert a.weak_type == b.weak_type
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("way", WAYS)
def test_a_plain_state_is_restored_to_the_bit(way, name, tmp_path):
    tx = MEMBERS[name]
    state = run(tx)
    plain = way(state, tmp_path)
    assert_same(restore(plain, into=tx.init(PARAMS)), state)
    assert_same(restore(plain, into=jax.eval_shape(tx.init, PARAMS)), state)


@pytest.mark.parametrize("name", ["adam", "adamw, 8bit", "amsgrad, 4bit", "a rate alone"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("take", [lambda tx, *trees: tx.update(*trees), adamfn.step])
def test_the_error_says_how_to_keep_the_moments(take, way, name, tmp_path):
    tx = MEMBERS[name]
    plain = way(run(tx), tmp_path)
    with pytest.raises(
        (TypeError, ValueError), match=r"adamfn\.interop\.restore\(state, into=tx\.in"
    ):
        take(tx, PARAMS, plain, PARAMS)


def test_a_state_of_something_else_is_told_from_a_plain_one():
    with pytest.raises(
        TypeError, match="belongs to another transformation: make it with this one's"
    ):
        adamfn.adam().update(PARAMS, (*adamfn.adam().init(PARAMS)[:2], adamfn.EmptyState()))
    with pytest.raises(ValueError, match=r"tuple of 4.* belongs to another chain"):
        adamfn.adam().update(PARAMS, adamfn.adamw().init(PARAMS))


def test_moments_alone_in_other_containers():
    tx = MEMBERS["adam"]
    moments, *rest = run(tx)
    moments = moments._replace(mu={**moments.mu, "b": tuple(moments.mu["b"])})
    with pytest.raises(
        ValueError, match=r"different containers.* `restore` for a state that lost its"
    ):
        tx.update(PARAMS, (moments, *rest))
    assert_same(restore((moments, *rest), into=tx.init(PARAMS)), run(tx))


def test_variables_of_flax_lose_their_types():
    params = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    tx = adamfn.adam()
    _, state = tx.update(params, tx.init(params))
    for value in (lambda x: x[...], lambda x: {"value": x[...]}):
        moments = [
            {name: value(getattr(state[0], field)[name]) for name in ("kernel", "bias")}
            for field in ("mu", "nu")
        ]
        plain = [[state[0].count, *moments, ()], [], [state[2].learning_rate]]
        found = restore(plain, into=tx.init(params))
        assert jax.tree.structure(found) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, found, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[:1], "at 2/learning_rate the tree has nothing; expected float32.."),
        (lambda s: [*s, [jnp.ones(2)]], r"at 3/0 the tree has float32\[2\]; expected nothing"),
        (
            lambda s: [s[0], s[1], {"rate": s[2]["learning_rate"]}],
            "at 2/learning_rate the tree has nothing; .* without a place: 2/rate",
        ),
        (
            lambda s: [s[0] | {"count": np.int64(3)}, *s[1:]],
            r"at 0/count the tree has int64\[\]; expected int32\[\]",
        ),
        (lambda s: [s[0] | {"count": 3}, *s[1:]], "at 0/count the tree has the Python int 3; exp"),
        (
            lambda s: [s[0] | {"mu": s[0]["mu"] | {"w": np.ones((256, 16), np.float32)}}, *s[1:]],
            r"at 0/mu/w the tree has float32\[256,16\]; expected float32\[16,256\]",
        ),
        (lambda s: {}, "at 0/count the tree has nothing; expected int32.*place: none"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    plain = [part._asdict() for part in run(MEMBERS["adam"])]
    with pytest.raises(ValueError, match=f"^restore: .*{message}"):
        restore(change(plain), into=MEMBERS["adam"].init(PARAMS))


def test_another_format_is_named():
    plain = [part._asdict() for part in run(MEMBERS["adam"])]
    with pytest.raises(
        ValueError, match=r"0/mu/w the tree has float32.*; expected int8.*\.convert"
    ):
        restore(plain, into=adamfn.adam(moments="8bit").init(PARAMS))


def test_the_result_is_a_copy_and_lies_where_it_belongs():
    tx = MEMBERS["adam"]
    plain = [jax.tree.map(np.array, part._asdict()) for part in run(tx)]
    found = restore(plain, into=tx.init(PARAMS))
    plain[0]["mu"]["w"][:] = 7.0
    assert_same(found, run(tx))
    device = jax.devices()[0]
    like = jax.device_put(tx.init(PARAMS), device)
    leaves = jax.tree.leaves(restore(plain, into=like))
    assert all(leaf.committed for leaf in leaves)
    assert not any(leaf.committed for leaf in jax.tree.leaves(found))
