# SPDX-License-Identifier: Apache-2.0
"""adamfn.interop.torch: recorded torch runs are taken over and handed back."""

import json
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_torch import FOLLOWED, recorded, torch_like, train, worst_difference
from torch_trajectories import ALL_RUNS, CASES, DATA, TAKEN_OVER, begin

import adamfn
from adamfn.interop.torch import from_flax, from_state_dict, to_flax, to_state_dict


def recorded_state_dict(problem, run, names):
    """Torch's own after 40 steps, with its parameters in the order of `names`."""
    state = {}
    with np.load(DATA) as data:
        for index, name in enumerate(names):
            prefix = f"{problem}/{run}/state/{name}/"
            state[index] = {
                key.removeprefix(prefix): data[key] for key in data if key.startswith(prefix)
            }
        group = json.loads(str(data[f"{problem}/{run}/group"]))
    return {"state": state, "param_groups": [group | {"params": list(range(len(names)))}]}


def small(optimizer="Adam", steps=3, shapes=((2, 3), (3,)), **group):
    """A state dict as torch's, with moments that tell parameters and keys apart."""
    defaults = {
        "Adam": {"amsgrad": False, "decoupled_weight_decay": False, "weight_decay": 0},
        "NAdam": {"momentum_decay": 4e-3, "decoupled_weight_decay": False, "weight_decay": 0},
        "RAdam": {"decoupled_weight_decay": False, "weight_decay": 0},
        "Adamax": {"weight_decay": 0, "foreach": None},
        "SparseAdam": {"maximize": False},
    }[optimizer]
    keys = ["exp_avg", "exp_inf" if optimizer == "Adamax" else "exp_avg_sq"]
    keys += ["max_exp_avg_sq"] * bool(group.get("amsgrad"))
    state = {}
    for index, shape in enumerate(shapes):
        state[index] = {"step": np.float32(steps)}
        if optimizer == "NAdam":
            state[index]["mu_product"] = np.float32(0.1)
        for number, key in enumerate(keys):
            start = 100 * index + 10 * number + 1
            count = int(np.prod(shape))
            state[index][key] = np.arange(start, start + count, dtype=np.float32).reshape(shape)
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-6, **defaults, **group}
    return {"state": state, "param_groups": [group | {"params": list(range(len(shapes)))}]}


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


PARAMS = {"w": jnp.ones((2, 3)), "z": jnp.ones(3)}


@pytest.mark.parametrize(("problem", "run"), FOLLOWED)
def test_a_torch_run_goes_on(problem, run):
    _, params = begin(problem)
    state_dict = recorded_state_dict(problem, run, params)
    params = recorded(problem, run, params, TAKEN_OVER)
    tx, state = from_state_dict(state_dict, params, paths=list(params))
    *_, (_, found) = train(problem, tx, params, state, TAKEN_OVER, 2 * TAKEN_OVER)
    expected = recorded(problem, run, params, 2 * TAKEN_OVER)
    assert worst_difference(found, expected) <= 1e-6 + torchs_own_drift(run)


def torchs_own_drift(run):
    """How far 40 products with 1 - lr weight_decay, rounded to float32, lead torch astray."""
    optimizer, arguments = ALL_RUNS[run]
    decay = arguments.get("weight_decay", 0.01 if optimizer == "AdamW" else 0)
    if optimizer != "AdamW" and not arguments.get("decoupled_weight_decay"):
        return 0
    factor = 1 - arguments.get("lr", 1e-3) * decay
    return TAKEN_OVER * abs(float(np.float32(factor)) / factor - 1)


@pytest.mark.parametrize(("problem", "run"), CASES)
def test_there_and_back_is_the_same_to_the_bit(problem, run):
    _, params = begin(problem)
    state_dict = recorded_state_dict(problem, run, params)
    _, state = from_state_dict(state_dict, params, paths=list(params))
    back = to_state_dict(state, like=state_dict, paths=list(params))
    assert back["param_groups"] == state_dict["param_groups"]
    assert back["state"].keys() == state_dict["state"].keys()
    for index, entries in state_dict["state"].items():
        assert back["state"][index].keys() == entries.keys()
        for key, value in entries.items():
            np.testing.assert_array_equal(back["state"][index][key], value)
            if key != "step":
                assert back["state"][index][key].dtype == np.float32


@pytest.mark.parametrize(("problem", "run"), [c for c in CASES if c[0] != "least_squares"])
def test_the_chain_is_the_documented_one(problem, run):
    optimizer, arguments = ALL_RUNS[run]
    _, params = begin(problem)
    tx, _ = from_state_dict(recorded_state_dict(problem, run, params), params, paths=list(params))
    expected = torch_like(optimizer, **arguments)
    if "maximize" in arguments:  # negated by us and by optax, in other operations
        *_, (_, a) = train(problem, tx, params, tx.init(params), 0, 5)
        *_, (_, b) = train(problem, expected, params, expected.init(params), 0, 5)
        same(a, b)
        return
    found, written = (
        jax.make_jaxpr(lambda grads, params, tx=tx: tx.update(grads, tx.init(params), params))(
            params, params
        )
        for tx in (tx, expected)
    )
    assert str(found) == str(written)  # the same operations, and the same numbers in them
    same(found.consts, written.consts)


def test_a_single_group_has_the_state_of_the_recipe():
    tx, state = from_state_dict(small(), PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(adamfn.adam().init(PARAMS))
    assert [x.item() for x in jax.tree.leaves(state) if x.dtype == jnp.int32] == [3]
    assert state[0].nu["z"].tolist() == [111, 112, 113]
    _, state = tx.update(PARAMS, state)
    assert state[2].learning_rate == np.float32(0.1)


def test_groups_have_their_own_rates_and_decays():
    state_dict = small()
    first = state_dict["param_groups"][0]
    state_dict["param_groups"] = [
        first | {"params": [0], "lr": 0.5},
        first | {"params": [1], "weight_decay": 0.25, "decoupled_weight_decay": True},
    ]
    tx, state = from_state_dict(state_dict, PARAMS)
    grads = jax.tree.map(jnp.cos, PARAMS)
    updates, after = jax.jit(tx.update)(grads, state, PARAMS)
    for name, alone in (
        ("w", adamfn.adam(0.5, 0.9, 0.99, 1e-6)),
        ("z", adamfn.adamw(0.1, 0.9, 0.99, 1e-6, weight_decay=0.25)),
    ):
        own = alone.init(PARAMS[name])
        moments = own[0]._replace(
            count=jnp.int32(3),
            mu=jnp.asarray(state_dict["state"]["wz".index(name)]["exp_avg"]),
            nu=jnp.asarray(state_dict["state"]["wz".index(name)]["exp_avg_sq"]),
        )
        expected, _ = jax.jit(alone.update)(grads[name], (moments, *own[1:]), PARAMS[name])
        np.testing.assert_array_equal(updates[name], expected)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    back = to_state_dict(state, like=state_dict)
    jax.tree.map(np.testing.assert_array_equal, back["state"], state_dict["state"])


def test_parameters_after_different_numbers_of_steps():
    state_dict = small()
    state_dict["state"][1]["step"] = np.float32(7)
    tx, state = from_state_dict(state_dict, PARAMS)
    assert [part[0].count.item() for part in state] == [3, 7]
    _, state = tx.update(PARAMS, state, PARAMS)
    back = to_state_dict(state, like=state_dict)
    assert [back["state"][k]["step"].item() for k in (0, 1)] == [4, 8]


def test_a_parameter_without_a_step_begins_afresh():
    state_dict = small()
    del state_dict["state"][1]
    with pytest.raises(
        ValueError, match=r"fresh is \(\); expected .* no step with, z \(torch's parameter 1\)"
    ):
        from_state_dict(state_dict, PARAMS)  # most often it is frozen
    tx, state = from_state_dict(state_dict, PARAMS, fresh=["z"])
    assert [part[0].count.item() for part in state] == [3, 0]
    updates, _ = tx.update(PARAMS, state)
    np.testing.assert_allclose(updates["z"], -0.1, rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["Adam", "NAdam", "RAdam", "Adamax", "SparseAdam"])
def test_an_optimizer_before_its_first_step(optimizer):
    state_dict = small(optimizer) | {"state": {}}
    tx, state = from_state_dict(state_dict, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, state, tx.init(PARAMS))
    assert to_state_dict(state, like=state_dict)["state"][0]["step"] == 0


def test_a_schedule_goes_on_from_torchs_count():
    tx, state = from_state_dict(small(), PARAMS, learning_rate=lambda count: 0.5**count)
    _, state = tx.update(PARAMS, state)
    assert state[2].learning_rate == 0.125


@pytest.mark.parametrize(
    "paths",
    [
        ["out/bias", "out/kernel"],
        {0: "out/bias", 1: "out/kernel"},
        {"b": "out/bias", "w": "out/kernel"},
        {"w": "out/kernel", 0: "out/bias"},
    ],
    ids=str,
)
def test_tables_of_paths(paths):
    state_dict = small(shapes=((3,), (3, 2)))
    state_dict["param_groups"][0]["param_names"] = ["b", "w"]
    params = {"out": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    _, state = from_state_dict(state_dict, params, paths=paths, layout=to_flax)
    mu = state[0].mu["out"]
    np.testing.assert_array_equal(mu["kernel"], state_dict["state"][1]["exp_avg"].T)
    np.testing.assert_array_equal(mu["bias"], state_dict["state"][0]["exp_avg"])
    back = to_state_dict(state, like=state_dict, paths=paths, layout=from_flax)
    jax.tree.map(np.testing.assert_array_equal, back["state"], state_dict["state"])
    assert back["state"][1]["exp_avg"].flags.c_contiguous


def test_a_parameter_can_be_left_out():
    _, state = from_state_dict(small(), {"z": jnp.ones(3)}, paths=[None, "z"])
    assert state[0].mu["z"].tolist() == [101, 102, 103]
    like = small(steps=9)
    back = to_state_dict(state, like=like, paths=[None, "z"])["state"]
    same(back[0], like["state"][0])  # and keeps what it has
    assert back[1]["step"] == 3


@pytest.mark.parametrize("window", [(), (5,), (5, 7), (5, 7, 2)], ids=str)
def test_flax_kernels(window):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((16, 3, *window))
    kernel = to_flax("a/kernel", weight)
    assert kernel.shape == (*window, 3, 16)
    assert kernel[..., 1, 2].tolist() == weight[2, 1].tolist()
    np.testing.assert_array_equal(from_flax("a/kernel", kernel), weight)
    for path in ("a/bias", "kernel/scale/x", "embedding", "a/subkernel"):
        assert to_flax(path, weight) is weight
    assert to_flax("kernel/embedding", weight) is weight
    vector = weight.ravel()
    assert to_flax("a/kernel", vector) is vector


class Tensor:
    """Behaves as a torch tensor that lies on an accelerator and asks for a gradient."""

    def __init__(self, array, dtype="torch.float32"):
        self.array, self.dtype, self.shape, self.local = array, dtype, array.shape, False

    def detach(self):
        return Tensor(self.array, self.dtype)

    def cpu(self):
        found = Tensor(self.array, self.dtype)
        found.local = True
        return found

    def float(self):
        found = Tensor(self.array)
        found.local = self.local
        return found

    def __float__(self):
        return float(self.array)

    def __array__(self, dtype=None, copy=None):
        if not self.local or "bfloat16" in self.dtype:
            raise TypeError("can't convert this tensor to numpy")
        return self.array


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_tensors_of_any_device_and_width(dtype):
    plain = small()
    tensors = jax.tree.map(lambda x: Tensor(np.asarray(x), dtype), plain["state"])
    group = plain["param_groups"][0] | {"lr": Tensor(np.asarray(0.1))}
    _, state = from_state_dict({"state": tensors, "param_groups": [group]}, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, state, from_state_dict(plain, PARAMS)[1])


def test_the_state_can_be_donated():
    state_dict = small("NAdam")
    state_dict["state"][1]["step"] = np.float32(7)
    tx, state = from_state_dict(state_dict, PARAMS)
    _, state = jax.jit(tx.update, donate_argnums=1)(PARAMS, state)
    assert [part[0].count.item() for part in state] == [4, 8]


def test_paths_of_an_nnx_state_need_not_name_the_value():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(2, 3, rngs=rngs)

    params = nnx.state(Layer(nnx.Rngs(0)), nnx.Param)
    state_dict = small(shapes=((3, 2), (3,)))
    paths = ["dense/kernel", "dense/bias"]
    _, state = from_state_dict(state_dict, params, paths=paths, layout=to_flax)
    back = to_state_dict(state, like=state_dict, paths=paths, layout=from_flax)
    jax.tree.map(np.testing.assert_array_equal, back["state"], state_dict["state"])


def test_the_state_is_a_copy():
    # On a CPU, JAX would share the memory that torch goes on writing to.
    state_dict = small()
    _, state = from_state_dict(state_dict, PARAMS)
    state_dict["state"][1]["exp_avg"][:] = 0
    assert state[0].mu["z"].tolist() == [101, 102, 103]
    like = small()
    back = to_state_dict(state, like=like)
    for entries in back["state"].values():
        assert all(value.flags.writeable for value in entries.values())
    back["param_groups"][0]["lr"] = 7.0
    assert like["param_groups"][0]["lr"] == 0.1


def test_narrow_parameters_get_wide_moments():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx, state = from_state_dict(small(), params)
    assert state[0].mu["w"].dtype == jnp.float32
    assert tx.update(params, state)[0]["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("moments", ["8bit", "4bit", "factored", "blockmean"])
def test_lean_moments_are_refused(moments):
    state = adamfn.adam(moments=moments).init({"b": jnp.ones(3), "w": jnp.ones((128, 256))})
    with pytest.raises(ValueError, match="moments are stored in codes, such as those at w"):
        to_state_dict(state, like=small(shapes=((3,), (128, 256))))


@pytest.mark.parametrize("optimizer", ["Adam", "NAdam", "RAdam", "Adamax", "SparseAdam"])
def test_what_step_returns_needs_no_conversion(optimizer):
    state_dict = small(optimizer)
    tx, state = from_state_dict(state_dict, PARAMS)
    grads = jax.tree.map(jnp.cos, PARAMS)
    _, stepped = jax.jit(partial(adamfn.step, tx))(grads, state, PARAMS)
    _, updated = jax.jit(tx.update)(grads, state, PARAMS)
    found, expected = (to_state_dict(x, like=state_dict)["state"] for x in (stepped, updated))
    assert {float(entries["step"]) for entries in found.values()} == {4}
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        # Two programs: an average is a product and a sum, which may be one instruction or two.
        np.testing.assert_allclose(a, b, rtol=3e-7)


def test_packed_states_go_by_way_of_plain_ones():
    tx, state = from_state_dict(small(), PARAMS)
    packed = adamfn.packed(tx)
    for unpacked in (tx.init(PARAMS), state):
        moved = adamfn.repack(packed, unpacked, PARAMS)
        with pytest.raises(ValueError, match=r"to_state_dict: state is packed.*adamfn\.repack"):
            to_state_dict(moved, like=small())
        plain = adamfn.repack(packed, moved, PARAMS)
        same(plain, unpacked)
    assert to_state_dict(plain, like=small())["state"][0]["step"] == 3


def test_bfloat16_moments_are_handed_over():
    params = {"w": jnp.ones((128, 256))}
    tx = adamfn.adam(moments="bfloat16")
    _, state = tx.update(params, tx.init(params))
    back = to_state_dict(state, like=small(shapes=((128, 256),)))
    np.testing.assert_allclose(back["state"][0]["exp_avg"].astype(float), 0.1, rtol=1e-2)


def test_a_state_inside_wrappers_is_found():
    _, state = from_state_dict(small(), PARAMS)
    wrapped = optax.MultiSteps(adamfn.adam(), 2).init(PARAMS)._replace(inner_opt_state=state)
    back = to_state_dict((optax.EmptyState(), wrapped), like=small())
    jax.tree.map(np.testing.assert_array_equal, back["state"], small()["state"])


def test_old_state_dicts_that_do_not_tell_adam_from_adamw():
    state_dict = small(weight_decay=0.5)
    del state_dict["param_groups"][0]["decoupled_weight_decay"]
    with pytest.raises(ValueError, match="does not tell Adam from AdamW"):
        from_state_dict(state_dict, PARAMS)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    for optimizer, update in (("AdamW", -0.05), ("Adam", -0.1)):
        tx, _ = from_state_dict(state_dict, PARAMS, optimizer=optimizer)
        updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
        np.testing.assert_allclose(updates["z"], update, rtol=1e-4)
    state_dict["param_groups"][0]["weight_decay"] = 0
    from_state_dict(state_dict, PARAMS)


def without(state_dict, *keys):
    *outer, last = keys
    part = state_dict
    for key in outer:
        part = part[key]
    del part[last]
    return state_dict


SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0, "nesterov": False, "params": [0, 1]}
SPARSE = Tensor(np.ones((2, 3)))
SPARSE.is_sparse = True
BAD = {
    "no state dict": (3, TypeError, "the state dict is 3; expected a torch optimizer's state_dict"),
    "a model's": (
        {"fc.weight": 0},
        TypeError,
        r"the state dict is \{'fc.weight': 0\}; expected a torch",
    ),
    "another optimizer": (
        {"state": {}, "param_groups": [SGD]},
        ValueError,
        "parameter 0 has the hyperparameters lr, momentum.* expected one of Adam, AdamW, NAdam",
    ),
    "another's moments": (
        {**small("RAdam"), "state": {k: {"step": 1, "exp_avg": 0} for k in (0, 1)}}
        | {"param_groups": [without(small("RAdam")["param_groups"][0], "decoupled_weight_decay")]},
        ValueError,
        "weight_decay, params, its state step, exp_avg; expected one of",
    ),
    "a missing key": (
        without(small(), "state", 1, "exp_avg_sq"),
        ValueError,
        "the state of torch's parameter 1 has no exp_avg_sq; found step, exp_avg. Pass",
    ),
    "a missing hyperparameter": (
        without(small(), "param_groups", 0, "lr"),
        ValueError,
        "the group of torch's parameter 0 has no lr",
    ),
    "groups that are none": (
        {"state": {}, "param_groups": None},
        TypeError,
        "the state dict is .*'param_groups': None.*; expected",
    ),
    "a group without params": (
        {"state": {}, "param_groups": [{}]},
        TypeError,
        "params of group 0 is None; expected",
    ),
    "a state that is none": (
        {"state": [], "param_groups": []},
        TypeError,
        r"the state dict is \{'param_groups': \[\], 'state': \[\]\}; expected",
    ),
    "one beta": (small(betas=0.9), TypeError, "betas in the group of .* is 0.9; expected two numb"),
    "a step that is not finite": (
        small(steps=float("nan")),
        TypeError,
        r"step of torch's parameter 0 is .*nan.*; expected a finite number",
    ),
    "string keys": (
        {**small(), "state": {"0": {}, "1": {}}},
        TypeError,
        r"state\['0'\] is \{\}; expected .* JSON makes strings of numbers",
    ),
    "entries that are none": (
        {**small(), "state": {0: 3}},
        TypeError,
        r"state\[0\] is 3; expected",
    ),
    "too few names": (
        small(param_names=["w"]),
        TypeError,
        r"names of group 0 is \['w'\]; expected",
    ),
    "a name for all": (small(param_names=3), TypeError, "param_names of group 0 is 3; expected"),
    "params that are no list": (
        {"state": {}, "param_groups": [SGD | {"params": 3}]},
        TypeError,
        "params of group 0 is 3; expected .* numbers or names as params",
    ),
    "the groups of the optimizer itself": (
        {"state": {}, "param_groups": [SGD | {"params": [Tensor(np.ones(3))]}]},
        TypeError,
        r"params of group 0 is \[<.*\(optimizer.param_groups has the tensors themselves",
    ),
    "moments that NumPy cannot read": (
        {**small(), "state": {0: {"step": 1, "exp_avg": [[1], [2, 3]], "exp_avg_sq": 0}}},
        TypeError,
        "exp_avg of torch's parameter 0, matched with w, is a list; expected a dense array",
    ),
    "a beta out of range": (
        small(betas=(0.9, 1.0)),
        ValueError,
        "the group of torch's parameter 0: b2 is 1.0; expected a number at least 0 and less",
    ),
    "a number as text": (small(lr="0.1"), TypeError, "lr in the group of .* is '0.1'"),
    "half a step": (small(steps=2.5), ValueError, "step of .* is 2.5; expected a number of steps"),
    "a negative step": (small(steps=-3), ValueError, "step of .* is -3.0; expected"),
    "another library's AdamW": (
        small("RAdam") | {"param_groups": [{**SGD, "betas": (0.9, 0.99), "eps": 1e-6}]},
        ValueError,
        "nesterov, params, betas, eps, its state step, exp_avg, exp_avg_sq; expected one of",
    ),
    "no number": (
        small(lr="fast"),
        TypeError,
        "lr in the group of .* is 'fast'; expected a finite number",
    ),
    "too many parameters": (
        small(shapes=((2, 3), (3,), (3,))),
        ValueError,
        "params has nothing for torch's parameter 2; expected one of the leaves w, z",
    ),
    "too few parameters": (
        small(shapes=((2, 3),)),
        ValueError,
        "params has 'z' for no torch parameter; expected",
    ),
    "another shape": (
        small(shapes=((3, 2), (3,))),
        ValueError,
        r"exp_avg of .* 0, matched with w, has the shape \(3, 2\); expected \(2, 3\)\. layout=",
    ),
    "a sparse tensor": (
        {**small(), "state": {0: {"step": 1, "exp_avg": SPARSE, "exp_avg_sq": 0}}},
        TypeError,
        "exp_avg of torch's parameter 0, matched with w, is sparse .*; expected a dense",
    ),
    "a step that is none": (
        {**small(), "state": {0: {"step": "x", "exp_avg": 0, "exp_avg_sq": 0}}},
        TypeError,
        "step of torch's parameter 0 is 'x'",
    ),
    "no moments": (
        {**small(), "state": {0: {"step": 1, "exp_avg": "x", "exp_avg_sq": 0}}},
        TypeError,
        "exp_avg of torch's parameter 0, matched with w, is a str; expected a dense array",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_state_dict_is_refused(case):
    state_dict, error, message = BAD[case]
    with pytest.raises(error, match=message):
        from_state_dict(state_dict, PARAMS)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["w"], "paths has nothing for torch's parameter 1; expected"),
        (["w", "y"], r"paths has 'y' for torch's parameter 1; expected one of the leaves w, z"),
        (
            ["w", "w"],
            "paths has 'w' for torch's parameter 1; expected one of the leaves w, z for each",
        ),
        (["w", None], "paths has nothing for the leaf at z"),
        ({0: "w"}, "paths has nothing for torch's parameter 1"),
        ({0: "w", 1: "z", 2: "y"}, "paths has 2 for no torch parameter"),
        ("wz", "paths has 'wz' for .* a sequence in torch's order"),
        (5, "paths has 5 for .* a sequence in torch's order"),
    ],
    ids=str,
)
def test_a_bad_table_is_refused(paths, message):
    with pytest.raises((TypeError, ValueError), match=message):
        from_state_dict(small(), PARAMS, paths=paths)


def test_parameters_that_cannot_be_taken_over():
    with pytest.raises(TypeError, match=r"params: the leaf at \['w'\] is int32"):
        from_state_dict(small(), PARAMS | {"w": jnp.ones((2, 3), int)})
    with pytest.raises(TypeError, match=r"the leaf at w is complex64\[2,3\]; expected a real one"):
        from_state_dict(small(), PARAMS | {"w": jnp.ones((2, 3), jnp.complex64)})
    with pytest.raises(ValueError, match="params has nothing for torch's parameter 0"):
        from_state_dict(small(), {})
    with pytest.raises(ValueError, match=r"optimizer is 'SGD', the .*; expected one of Adam"):
        from_state_dict(small(), PARAMS, optimizer="SGD")
    for optimizer in ("AdamW", "RAdam"):
        with pytest.raises(
            ValueError, match=f"optimizer is '{optimizer}', the .*; expected one of Adam. "
        ):
            from_state_dict(small(), PARAMS, optimizer=optimizer)
    with pytest.raises(TypeError, match="layout is 'flax'; expected one like to_flax"):
        from_state_dict(small(), PARAMS, layout="flax")
    with pytest.raises(
        TypeError, match=r"a tensor of torch's; .* Pass \.detach\(\)\.cpu\(\)\.numpy"
    ):
        from_state_dict(small(), [Tensor(np.ones((2, 3))), Tensor(np.ones(3))])
    with pytest.raises(ValueError, match="Two leaves have the path a/b"):
        from_state_dict(small(), {"a/b": jnp.ones((2, 3)), "a": {"b": jnp.ones(3)}})


def test_a_state_that_cannot_be_handed_over():
    state = adamfn.adam().init(PARAMS)
    with pytest.raises(
        TypeError,
        match=r"NAdam's; expected .* a ScaleByNesterovMomentsState .*; found a ScaleByMoments",
    ):
        to_state_dict(state, like=small("NAdam"))
    with pytest.raises(
        TypeError, match=r"Adamax's; expected .* a ScaleByInfinityMomentsState .*; found a ScaleByM"
    ):
        to_state_dict(state, like=small("Adamax"))
    with pytest.raises(
        TypeError, match=r"expected .* a ScaleByMaxMomentsState .*; found a ScaleByMomentsState"
    ):
        to_state_dict(state, like=small(amsgrad=True))
    with pytest.raises(ValueError, match=r"matched with w, has the shape \(2, 3\)"):
        to_state_dict(state, like=small(shapes=((3, 2), (3,))))
    with pytest.raises(TypeError, match=r"the count of the state at w is .*outside jax\.jit"):
        jax.jit(lambda state: to_state_dict(state, like=small()))(state)
    with pytest.raises(
        TypeError, match=r"the count of the state at w is ShapeDtypeStruct.*; expected"
    ):
        to_state_dict(jax.eval_shape(lambda: state), like=small())
    two = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    with pytest.raises(
        TypeError, match=r"count of the state at w is int32\[2\].* Pass the state of one run"
    ):
        to_state_dict(two, like=small() | {"state": {}})
    with pytest.raises(
        TypeError, match=r"matched with w, is complex64\[2,3\]; expected a dense array of real"
    ):
        to_state_dict(adamfn.adam().init(jax.tree.map(lambda x: 1j * x, PARAMS)), like=small())
    with pytest.raises(TypeError, match="layout is 'flax'; expected one like to_flax"):
        to_state_dict(state, like=small(), layout="flax")
    with pytest.raises(TypeError, match="layout's result for w is nothing; expected a dense array"):
        to_state_dict(state, like=small() | {"state": {}}, layout=lambda path, array: None)
    with pytest.raises(ValueError, match="state: found no moments"):
        to_state_dict(optax.sgd(0.1).init(PARAMS), like=small())


def test_groups_take_a_rate_at_update_and_work_in_flax():
    state_dict = small(shapes=((3, 2), (3,)))
    first = state_dict["param_groups"][0]
    state_dict["param_groups"] = [first | {"params": [0]}, first | {"params": [1], "lr": 0.5}]
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    params = nnx.state(layer, nnx.Param)
    paths = ["kernel", "bias"]
    tx, state = from_state_dict(state_dict, params, paths=paths, layout=to_flax)
    _, after = tx.update(params, state, params, learning_rate=0.25)
    assert [part[2].learning_rate for part in after] == [0.25, 0.25]
    optimizer = nnx.Optimizer(layer, optax.GradientTransformationExtraArgs(*tx), wrt=nnx.Param)
    before = np.asarray(layer.bias)
    optimizer.update(layer, nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2))) ** 2))(layer))
    assert np.all(np.abs(layer.bias - before) > 0.4)
    with pytest.raises(TypeError, match="by_group: found nothing as the state; expected a tuple"):
        tx.update(params, None, params)


def test_a_tree_with_other_leaves_is_refused():
    state_dict = small()
    state_dict["state"][1]["step"] = np.float32(7)
    tx, state = from_state_dict(state_dict, PARAMS)
    with pytest.raises(ValueError, match="found a leaf at y, which has no group; expected w, z"):
        tx.update(PARAMS | {"y": jnp.ones(1)}, state)


def test_torch_is_not_imported():
    code = (
        "import sys, adamfn, adamfn.interop.torch, adamfn.interop.optax;"
        "sys.exit(bool({'torch', 'optax', 'flax'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
