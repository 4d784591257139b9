"""Chains whose stages contradict one another are refused, with the reason."""

import optax
import pytest

import adamfn

REFUSED = {
    "two decays": (
        lambda: adamfn.chain(adamfn.add_decayed_weights(0.1), adamfn.adamw()),
        "add_decayed_weights and add_decayed_weights would both decay the same parameters",
    ),
    "AdamC's and another": (
        lambda: adamfn.chain(adamfn.add_corrected_decay(0.1, 1e-3, 1e-3), adamfn.adamw()),
        "add_corrected_decay and add_decayed_weights would both decay",
    ),
    "clipping after the rate": (
        lambda: adamfn.chain(adamfn.adam(), adamfn.clip_by_global_norm(1.0)),
        "clip_by_global_norm stands after scale_by_lr.* the rate of a step after it",
    ),
    "clipping of updates": (
        lambda: adamfn.chain(adamfn.scale_by_moments(), adamfn.clip_by_global_norm(1.0)),
        "clip_by_global_norm stands after scale_by_moments.* Put it first",
    ),
    "skipping after the moments": (
        lambda: adamfn.chain(adamfn.scale_by_moments(), adamfn.skip_outliers()),
        "skip_outliers stands after scale_by_moments",
    ),
    "skipping before what is not ours": (
        lambda: adamfn.chain(adamfn.skip_outliers(), optax.ema(0.9), adamfn.adam()),
        "skip_outliers stands before .* which is not fused with it",
    ),
    "a cautious decay after the rate": (
        lambda: adamfn.chain(adamfn.adam(), adamfn.add_decayed_weights(0.1, cautious=True)),
        "add_decayed_weights stands after scale_by_lr, which turns the signs",
    ),
    "cautious updates after the rate": (
        lambda: adamfn.chain(adamfn.adam(), adamfn.cautious_updates()),
        "cautious_updates stands after scale_by_lr, which turns the signs",
    ),
    "a second correction": (
        lambda: adamfn.chain(adamfn.scale_by_atan2_moments(), adamfn.bias_correct()),
        "bias_correct stands after scale_by_atan2_moments",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"(?i)chain: {message}"):
        make()


def test_allowed():
    mask = {"a": True, "b": False}
    adamfn.chain(
        optax.clip(1.0),
        adamfn.skip_outliers(),
        adamfn.clip_by_global_norm(1.0),
        adamfn.scale_by_moments(),
        adamfn.bias_correct(),
        adamfn.add_decayed_weights(0.1, mask),
        adamfn.add_corrected_decay(0.1, 1e-3, 1e-3, mask),
        adamfn.scale_by_lr(1e-3),
    )
    adamfn.chain(adamfn.adam(), optax.clip_by_global_norm(1.0))
