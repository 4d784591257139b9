# SPDX-License-Identifier: Apache-2.0
"""Where a state lies that `init` makes of arrays with a place, and what steps do with it."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import adamfn
from adamfn import formats
from adamfn.sharding import state_shardings

P = jax.P
MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
RECIPES = {
    "adamw": adamfn.adamw,
    "amsgrad": adamfn.amsgrad,
    "lazy_adam": adamfn.lazy_adam,
    "nadam": adamfn.nadam,
}
CASES = [("adamw", moments) for moments in ("float32", "8bit", "4bit", "factored")]
# A scalar of its own; scales of a third moment; rows at rest.
CASES += [("nadam", "float32"), ("amsgrad", "8bit"), ("lazy_adam", "8bit")]
SHAPES = {"rows": (128, 256), "blocks": (128, 2048), "bias": (8,)}
SPECS = {"rows": P("data"), "blocks": P(None, "data"), "bias": P("data")}


def drawn(seed):
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def on_mesh(specs=SPECS):
    return {name: jax.NamedSharding(MESH, specs[name]) for name in SHAPES}


def types_of(tree):
    types = [(x.shape, x.dtype, x.weak_type) for x in map(jax.typeof, jax.tree.leaves(tree))]
    return jax.tree.structure(tree), types


@pytest.mark.parametrize(("recipe", "moments"), CASES)
def test_one_structure_of_every_init(recipe, moments):
    tx, params = RECIPES[recipe](moments=moments), drawn(0)
    shapes = jax.eval_shape(tx.init, params)
    expected = types_of(shapes)
    placements = [jax.device_put(params, place) for place in (jax.devices()[3], on_mesh())]
    for placed in (params, *placements):
        made = tx.init(placed)
        assert types_of(made) == expected
        assert types_of(jax.jit(tx.init)(placed)) == expected
        assert types_of(jax.eval_shape(tx.init, placed)) == expected
    where = state_shardings(tx, params, on_mesh(), "data")
    for state in (tx.init(params), made):
        moved = jax.device_put(state, where)
        for x, y, sharding in zip(*map(jax.tree.leaves, (moved, state, where)), strict=True):
            assert x.sharding.is_equivalent_to(sharding, x.ndim)
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def leaf_of(path):
    """The name of the leaf that an array of a state belongs to; None for a scalar of the step."""
    for key, following in zip(path, (*path[1:], None), strict=True):
        if getattr(key, "name", None) == "scales":
            return following.key
        if getattr(key, "key", None) in SHAPES:
            return key.key
    return None


@pytest.mark.parametrize(("recipe", "moments"), CASES)
def test_leaves_on_different_devices(recipe, moments):
    """Each leaf and its state stay where the leaf lies; only scalars lie anywhere."""
    tx, devices = RECIPES[recipe](1e-2, moments=moments), jax.devices()
    apart = {"rows": devices[1], "blocks": devices[3], "bias": devices[3]}

    def train(places):
        def put(tree):
            return {name: jax.device_put(x, places[name]) for name, x in tree.items()}

        params = put(drawn(0))
        first = tx.init(params)
        updates, updated = tx.update(put(drawn(1)), first, params)
        params, state = adamfn.step(tx, put(drawn(1)), first, params)
        return first, updates, updated, params, state

    found, expected = train(apart), train(dict.fromkeys(SHAPES, devices[0]))
    for (path, x), y in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        if leaf_of(path):
            assert x.devices() == {apart[leaf_of(path)]}, path
        else:
            assert x.ndim == 0
            assert not x.committed
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


def test_large_leaves_on_different_devices_before_a_statistic():
    tx = adamfn.chain(adamfn.scale_by_moments(), adamfn.cautious_updates(), adamfn.scale_by_lr(0.1))
    large = np.ones((512, 512), np.float32)
    params = [jax.device_put(large, device) for device in jax.devices()[:3]]
    params, _ = adamfn.step(tx, params, tx.init(params), params)
    assert [x.devices() for x in params] == [{device} for device in jax.devices()[:3]]


@pytest.mark.parametrize("moments", formats.FORMATS)
def test_an_eager_init_lies_where_its_parameters_do(moments):
    tx = adamfn.adamw(moments=moments)
    device = jax.devices()[3]
    for x in jax.tree.leaves(tx.init(jax.device_put(drawn(0), device))):
        assert x.devices() == {device} if x.ndim else not x.committed
    params = jax.device_put(drawn(0), on_mesh())
    state = tx.init(params)[0]
    kept = [(leaf_of(path), x) for path, x in jax.tree.leaves_with_path(state) if leaf_of(path)]
    assert {name for name, _ in kept} == set(SHAPES)
    for name, x in kept:
        # A number for all of an axis is everywhere; no block is cut by a device's 256 columns.
        axes = (*SPECS[name], None)[: x.ndim]
        spec = P(*(None if n == 1 else axis for n, axis in zip(x.shape, axes, strict=True)))
        assert x.sharding.is_equivalent_to(jax.NamedSharding(MESH, spec), x.ndim), (name, x.shape)
        assert x.committed


def test_scales_of_blocks_that_are_cut_are_everywhere():
    split = jax.NamedSharding(MESH, P(None, "data"))
    params = jax.device_put(np.ones((99, 1024), np.float32), split)  # four blocks on eight devices
    state = adamfn.adamw(moments="8bit").init(params)[0]
    assert state.mu.sharding.is_equivalent_to(split, 2)
    for scale in jax.tree.leaves(state.scales):
        assert scale.shape == (99, 4)
        assert scale.sharding.is_fully_replicated
        assert len(scale.devices()) == 8


def test_packed_leaves_lie_together():
    tx, devices = adamfn.packed(adamfn.adam(0.1)), jax.devices()
    params = jax.device_put(drawn(0), devices[3])
    state = tx.init(params)
    params, after = adamfn.step(tx, params, state, params)
    for x in jax.tree.leaves((params, state, after)):
        assert x.devices() == {devices[3]} if x.ndim else not x.committed
    bias = params["bias"]
    with pytest.raises(ValueError, match=r"packed: .*2 devices; expected .*Leave `packed` out"):
        tx.init({"a": bias, "b": jax.device_put(bias, devices[1])})
    split = jax.device_put(bias, jax.NamedSharding(MESH, P("data")))
    with pytest.raises(ValueError, match=r"packed: .*8 devices; expected .*Leave `packed` out"):
        tx.init(split)


@pytest.mark.parametrize("how", ["update", "step"])
def test_a_state_on_one_device_and_parameters_on_a_mesh_are_named(how):
    tx, params = adamfn.adamw(), jax.device_put(drawn(0), on_mesh())
    one = jax.device_put(tx.init(drawn(0)), jax.devices()[0])
    call = tx.update if how == "update" else lambda *arguments: adamfn.step(tx, *arguments)
    message = "scale_by_moments: at bias the gradient is on 8 devices .*, and the state on 1 "
    with pytest.raises(ValueError, match=message + ".*jax.device_put.state, adamfn.sharding"):
        call(params, one, params)
    moved = jax.device_put(one, state_shardings(tx, params, on_mesh()))  # the way out
    count_alone = moved[0]._replace(count=one[0].count)
    with pytest.raises(ValueError, match=message):
        call(params, (count_alone, *moved[1:]), params)
    call(params, moved, params)
    call(params, tx.init(drawn(0)), params)  # arrays that may be moved are
    if how == "update":  # parameters that nothing reads may be anywhere
        grads, adam = jax.device_put(drawn(0), jax.devices()[1]), adamfn.adam()
        adam.update(grads, adam.init(grads), params)


@pytest.mark.parametrize("how", ["update", "step"])
def test_under_jit_explicit_axes_tell_that_a_state_is_elsewhere(how):
    tx = adamfn.adamw()
    call = tx.update if how == "update" else lambda *arguments: adamfn.step(tx, *arguments)
    types = (AxisType.Explicit,)
    mesh, other = (
        jax.make_mesh((8,), ("data",), types),
        jax.make_mesh((4, 2), ("a", "b"), types * 2),
    )
    whole = np.ones((8, 16), np.float32)
    params = {"w": jax.device_put(whole, jax.NamedSharding(mesh, P("data")))}
    apart = {"w": jax.device_put(whole, jax.NamedSharding(other, P("a")))}
    elsewhere = r"on a mesh of \{'a': 4, 'b': 2\}"
    cases = [(tx.init({"w": whole}), params, "state .*on no mesh")]
    cases += [(tx.init(apart), params, f"state .*{elsewhere}")]
    cases += [(tx.init(params), apart, f"parameter .*{elsewhere}")]
    for state, weights, says in cases:
        with pytest.raises(ValueError, match=f"scale_by_moments: at w the .*{says}"):
            jax.jit(call)(params, state, weights)
    jax.jit(call)(params, tx.init(params), params)
