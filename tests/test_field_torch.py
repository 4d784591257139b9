# SPDX-License-Identifier: Apache-2.0
"""State dicts of torch's look-alikes: what their groups say is done, or refused by name.

The dicts are as the libraries write them; the steps beside them are their formulas in float64.
Apex issue 577 (a group without bias_correction), apex pull 1615 and TransformerEngine pull 3318
(the step in the group), fairseq issue 3965 (amsgrad turned on), apex issue 1124 (no correction).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamfn
from adamfn.interop.torch import from_state_dict, to_state_dict

B1, B2, EPS, LR, DECAY, STEP = 0.9, 0.99, 1e-3, 0.1, 0.3, 3
RNG = np.random.default_rng(0)
PARAM, M, V = RNG.normal(size=(4, 8)), 0.1 * RNG.normal(size=(4, 8)), RNG.uniform(0, 1e-4, (4, 8))
GRADS = RNG.normal(size=(5, 4, 8)) * [[[1e-3], [1e-2], [0.1], [1.0]]]
BASE = {"lr": LR, "betas": (B1, B2), "eps": EPS, "weight_decay": DECAY}
TORCH = {"maximize": False, "foreach": None, "capturable": False}
TIMM = {"amsgrad": False, "caution": True, "corrected_weight_decay": False}
TIMM |= {"max_lr_snapshot": LR, "clipping_threshold": None, **TORCH}


def state_dict(group, state=None, **more):
    kept = {"step": STEP, "exp_avg": M, "exp_avg_sq": V} if state is None else state
    kept = {
        key: np.float32(x) if key in ("exp_avg", "exp_avg_sq") else x for key, x in kept.items()
    }
    return {"state": {0: kept | more}, "param_groups": [{**BASE, **group, "params": [0]}]}


def steps(tx, state):
    """The parameter after each step."""
    params = {"w": jnp.float32(PARAM)}
    update = jax.jit(tx.update)
    for g in GRADS:
        updates, state = update({"w": jnp.float32(g)}, state, params)
        params = adamfn.apply_updates(params, updates)
        yield np.float64(params["w"])


def reference(
    *, bias=True, own_eps=False, decay="decoupled", caution=False, uphill=False, amsgrad=False
):
    p, m, v, largest = PARAM, np.float64(np.float32(M)), np.float64(np.float32(V)), 0.0
    for t, g in enumerate(GRADS, start=STEP + 1):
        g = -g if uphill else g
        g = g + DECAY * p if decay == "coupled" else g
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        largest = np.maximum(largest, v)
        c1, c2 = (1 - B1**t, 1 - B2**t) if bias else (1, 1)
        root = np.sqrt(largest if amsgrad else v)
        u = m / c1 * np.sqrt(c2) / (root + EPS) if own_eps else m / c1 / (root / np.sqrt(c2) + EPS)
        if caution:
            agree = np.float64(m * g > 0)
            u = u * agree / max(agree.mean(), 1e-3)
        if decay == "decoupled":
            p = p * (1 - LR * DECAY) - LR * u
        elif decay == "last":  # of what has moved
            p = (p - LR * u) * (1 - LR * DECAY)
        else:
            p = p - LR * u
        yield p


CASES = {
    "transformers": ({"correct_bias": True}, {}, {"own_eps": True, "decay": "last"}),
    "transformers, correct_bias=False": (
        {"correct_bias": False},
        {},
        {"bias": False, "own_eps": True, "decay": "last"},
    ),
    "apex": ({"bias_correction": True}, {"optimizer": "AdamW"}, {}),
    "apex, bias_correction=False": (
        {"bias_correction": False},
        {"optimizer": "AdamW"},
        {"bias": False},
    ),
    "apex, adam_w_mode=False": (
        {"bias_correction": True},
        {"optimizer": "Adam"},
        {"decay": "coupled"},
    ),
    "adam_w_mode in the group": ({"bias_correction": True, "adam_w_mode": 1}, {}, {}),
    "no adam_w_mode in the group": (
        {"bias_correction": True, "adam_w_mode": 0},
        {},
        {"decay": "coupled"},
    ),
    "timm, caution": (TIMM, {}, {"caution": True}),
    "timm, uphill": (TIMM | {"maximize": True}, {}, {"caution": True, "uphill": True}),
    "timm without caution": (TIMM | {"caution": False}, {}, {}),
    "bitsandbytes": ({"alpha": 0.0, "t_alpha": None, "t_beta3": None}, {}, {}),
    "torch": ({**TORCH, "amsgrad": False, "decoupled_weight_decay": True, "fused": True}, {}, {}),
    "torch, coupled": (
        {**TORCH, "amsgrad": False, "decoupled_weight_decay": False, "differentiable": True},
        {},
        {"decay": "coupled"},
    ),
    # torch raises a KeyError here; a maximum of its own begins at zero.
    "amsgrad turned on": (
        {**TORCH, "amsgrad": True, "decoupled_weight_decay": True},
        {},
        {"amsgrad": True},
    ),
    "a scheduler's notes": ({"correct_bias": True, "initial_lr": 1.0, "max_lr": 2.0}, {}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_group_says_is_done(case):
    group, more, says = CASES[case]
    says = CASES["transformers"][2] if says is None else says
    tx, state = from_state_dict(state_dict(group), {"w": jnp.float32(PARAM)}, **more)
    for found, expected in zip(steps(tx, state), reference(**says), strict=True):
        np.testing.assert_allclose(found, expected, rtol=3e-6, atol=1e-6)


def test_the_cases_differ_from_one_another():
    # Or following one of them would say nothing of its settings.
    ends = {
        str(says): list(reference(**says))[-1] for *_, says in CASES.values() if says is not None
    }
    ends = list(ends.values())
    assert len(ends) == 8
    for i, a in enumerate(ends):
        assert min((np.abs(a - b).max() for b in ends[:i]), default=1) > 1e-4


def test_a_rate_given_at_update_is_the_last_decays_too():
    tx, state = from_state_dict(state_dict({"correct_bias": True}), {"w": jnp.float32(PARAM)})
    g, params = {"w": jnp.float32(GRADS[0])}, {"w": jnp.float32(PARAM)}
    updates, _ = tx.update(g, state, params, learning_rate=0.0)
    np.testing.assert_array_equal(updates["w"], 0)
    halved, _ = from_state_dict(
        state_dict({"correct_bias": True}), params, learning_rate=lambda count: 0.5**count
    )
    schedule, _ = halved.update(g, state, params)
    given, _ = tx.update(g, state, params, learning_rate=0.5**STEP)
    np.testing.assert_allclose(schedule["w"], given["w"], rtol=1e-6)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"corrected_weight_decay": True}, "corrected_weight_decay=True, which no chain here does"),
        ({"clipping_threshold": 1.0}, "clipping_threshold=1.0, which no chain here does"),
        ({"alpha": 5.0, "t_beta3": None}, "alpha=5.0, which no chain here does; expected 0.0"),
        ({"adanorm": False}, r"adanorm=False, which is not known.* pass harmless=\['adanorm'\]"),
        (
            {"correct_bias": True, "amsgrad": True},
            "amsgrad=True, which no known optimizer does beside bias_correction or correct_bias",
        ),
        (
            {"bias_correction": True, "adam_w_mode": 1, "amsgrad": True},
            "amsgrad=True, which no known optimizer does beside bias_correction",
        ),
        (
            {"caution": True, "amsgrad": False, "decoupled_weight_decay": False},
            "caution=True, .* beside a decay that is not decoupled",
        ),
        ({"bias_correction": True}, "does not tell Adam from AdamW, .*adam_w_mode"),
        ({"caution": True}, "expected one of Adam, AdamW"),  # timm's NAdamW
    ],
    ids=str,
)
def test_what_no_chain_does_is_refused(group, message):
    torchs = {"amsgrad": False, "decoupled_weight_decay": True}
    known = {"correct_bias", "bias_correction", "caution", "t_beta3"} & set(group)
    with pytest.raises(ValueError, match=message):
        from_state_dict(state_dict(group if known else torchs | group), {"w": jnp.float32(PARAM)})


def test_keys_that_the_user_knows_are_ignored():
    like = state_dict({"correct_bias": True, "my_note": "head"})
    tx, _ = from_state_dict(like, {"w": jnp.float32(PARAM)}, harmless=["my_note"])
    tx.init({"w": jnp.float32(PARAM)})


def test_a_step_that_stands_in_the_group():
    """Of apex's FusedAdam, whose state has moments alone; DeepSpeed's has the step in both."""
    fused = state_dict({"bias_correction": True, "weight_decay": 0.0, "step": STEP})
    del fused["state"][0]["step"]
    tx, state = from_state_dict(fused, {"w": jnp.float32(PARAM)})
    assert state[0].count == STEP
    _, state = tx.update({"w": jnp.float32(PARAM)}, state)
    back = to_state_dict(state, like=fused)
    assert back["param_groups"][0]["step"] == back["state"][0]["step"] == STEP + 1
    assert type(back["param_groups"][0]["step"]) is int
    fused["param_groups"][0].pop("step")
    with pytest.raises(ValueError, match="the state of torch's parameter 0 has no step"):
        from_state_dict(fused, {"w": jnp.float32(PARAM)})


def quantized(x, table, size):
    """Codes as bitsandbytes': of each block, the nearest in the table to x over its largest."""
    blocks = np.pad(x.ravel(), (0, -x.size % size)).reshape(-1, size)
    scales = np.abs(blocks).max(1)
    codes = np.abs(blocks[:, :, None] / scales[:, None, None] - table).argmin(-1)
    return codes.ravel()[: x.size].reshape(x.shape).astype(np.uint8), np.float32(scales)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("size", [256, 2048, None, 96])
def test_eight_bits_of_bitsandbytes(size, wrapped):
    rng = np.random.default_rng(1)
    # Blocks go along the array as it lies in memory, whatever its rows.
    shape = (70, 75)
    mu, nu = rng.normal(size=shape), rng.normal(size=shape) ** 2
    tables = np.linspace(-1, 1, 256, dtype=np.float32), np.linspace(0, 1, 256, dtype=np.float32)
    kept = {}
    for number, (x, table) in enumerate(zip((mu, nu), tables, strict=True), start=1):
        codes, scales = quantized(x, table, size or x.size)
        kept |= {f"state{number}": codes, f"qmap{number}": table}
        kept[f"absmax{number}" if size else f"max{number}"] = scales
    kept |= {"blocksize": 96} if size == 96 else {}
    state = {"step": 7, "__bnb_optimizer_quant_state__": kept} if wrapped else {"step": 7, **kept}
    group = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
    _, state = from_state_dict(state_dict(group, state), {"w": jnp.ones(shape)})
    assert state[0].count == 7
    # Half a level of the table, of the largest of the block.
    np.testing.assert_allclose(state[0].mu["w"], mu, atol=1.01 * np.abs(mu).max() / 255)
    np.testing.assert_allclose(state[0].nu["w"], nu, atol=1.01 * nu.max() / 510)
    with pytest.raises(
        TypeError, match=r"is bitsandbytes's; expected torch\.optim's.* that does what this run did"
    ):
        to_state_dict(state, like=state_dict(group, {}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qmap2": None}, "has no qmap2; found step, state1"),
        (
            {"absmax1": np.ones(5, np.float32)},
            "has 5 scales .* for 5250 elements; expected a scale for",
        ),
        (
            {"qmap1": np.ones(16, np.float32)},
            r"a table qmap1 of the shape \(16,\) for .*; expected .* the shape \(256,\)",
        ),
        ({"unorm_vec": np.ones(1)}, "has unorm_vec, of bitsandbytes' max_unorm"),
        ({"gnorm_vec": np.ones(100)}, "has gnorm_vec, of bitsandbytes' percentile_clipping"),
    ],
    ids=str,
)
def test_what_does_not_fit_in_bitsandbytes_is_named(change, message):
    kept = {"step": 1}
    for number in (1, 2):
        kept |= {f"state{number}": np.zeros((70, 75), np.uint8)}
        kept |= {f"qmap{number}": np.ones(256, np.float32)}
        kept |= {f"absmax{number}": np.ones(21, np.float32)}
    kept = {key: value for key, value in (kept | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        from_state_dict(state_dict({}, kept), {"w": jnp.ones((70, 75))})


def test_a_negative_second_moment_is_refused():
    kept = {"step": 1, "exp_avg": M, "exp_avg_sq": np.where(V.max() == V, -1e-9, V)}
    torchs = {"amsgrad": False, "decoupled_weight_decay": True}
    with pytest.raises(
        ValueError, match=r"exp_avg_sq of .* has an element of -1e-09; expected none"
    ):
        from_state_dict(state_dict(torchs, kept), {"w": jnp.float32(PARAM)})
    kept["exp_avg_sq"] = np.where(V.max() == V, np.nan, V)  # what is not finite stays visible
    _, state = from_state_dict(state_dict(torchs, kept), {"w": jnp.float32(PARAM)})
    assert np.isnan(state[0].nu["w"]).sum() == 1


def test_a_frozen_parameter_is_named():
    """Torch leaves it alone; zero gradients would shrink it here, by AdamW's decay.

    diffusers issue 1009 and Muon issue 54 are weights that shrank so.
    """
    both = state_dict({"correct_bias": True})
    both["param_groups"][0]["params"] = [0, 1]
    params = {"w": jnp.float32(PARAM), "frozen": jnp.ones(3)}
    with pytest.raises(
        ValueError, match=r"no step with, frozen \(torch's parameter 1\)\. .* fresh=\['frozen'\]"
    ):
        from_state_dict(both, params, paths=["w", "frozen"])
    tx, state = from_state_dict(both, {"w": params["w"]}, paths=["w", None])
    tx.update({"w": params["w"]}, state, {"w": params["w"]})
    tx, state = from_state_dict(both, params, paths=["w", "frozen"], fresh=["frozen"])
    assert [part[0].count for part in state] == [STEP, 0]
    for wrong in (["x"], "frozen"):
        with pytest.raises(
            ValueError, match=r"fresh is .*; expected the leaves that torch took no step with"
        ):
            from_state_dict(both, params, paths=["w", "frozen"], fresh=wrong)
