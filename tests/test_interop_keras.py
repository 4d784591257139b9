# SPDX-License-Identifier: Apache-2.0
"""`interop.keras`: Keras's `compile` and `fit` train by a transformation, save, and go on."""

import keras
import numpy as np
import optax
import pytest

import adamfn
from adamfn.interop.keras import Optimizer

X = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
Y = X @ np.array([[1.0], [-2.0], [0.5]], np.float32)


@keras.saving.register_keras_serializable("adamfn_tests")
class Lean(Optimizer):
    def __init__(self, **kwargs):
        tx = adamfn.adamw(1e-2, moments="8bit", weight_decay=0.1)
        super().__init__(adamfn.chain(tx, adamfn.round_weights(24)), **kwargs)


def network(optimizer, units=1, dtype="float32"):
    layers = [keras.layers.Dense(units, dtype=dtype, name=f"dense_{k}") for k in range(11)[-2:]]
    model = keras.Sequential([keras.Input([3]), *layers, keras.layers.Dense(1, name="last")])
    rng = np.random.default_rng(1)
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    model.compile(optimizer=optimizer, loss="mse")
    return model


def fit(model, epochs=3, **settings):
    return model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, **settings)


def test_a_run_is_saved_and_goes_on_to_the_bit(tmp_path):
    model = network(Lean(), units=128, dtype="bfloat16")  # large enough to be stored in codes
    fit(model)
    kinds = {str(v.dtype) for v in model.optimizer.variables}
    assert {"int8", "uint8", "float32", "int32"} <= kinds
    model.save(tmp_path / "x.keras")
    loaded = keras.saving.load_model(tmp_path / "x.keras")
    for a in (model, loaded):
        fit(a)
    for part in (lambda m: m.weights, lambda m: m.optimizer.variables):
        for a, b in zip(part(model), part(loaded), strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_it_trains_as_the_transformation_alone():
    model = network(Optimizer(adamfn.adam(0.1)))
    by_optax = network(Optimizer(optax.adam(0.1)))
    keras_own = network(keras.optimizers.Adam(0.1, epsilon=1e-8))
    for m in (model, by_optax, keras_own):
        fit(m)
    # float32 of six steps; Keras's epsilon of 1e-8 is added to another root
    for a, b, c in zip(*(m.get_weights() for m in (model, by_optax, keras_own)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-5)


def test_gradients_are_accumulated():
    """Two batches of eight are one of sixteen."""
    model = network(Optimizer(adamfn.adam(0.1), gradient_accumulation_steps=2))
    whole = network(Optimizer(adamfn.adam(0.1)))
    fit(model)
    whole.fit(X, Y, batch_size=16, epochs=3, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # sums in another order
    assert int(model.optimizer.iterations) == 3


def test_callbacks_change_the_rate():
    rates = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 if epoch == 0 else 0.0)
    model, once = (network(Optimizer(adamfn.adam(1.0), learning_rate=0.5)) for _ in range(2))
    fit(model, callbacks=[rates])
    fit(once, epochs=1, callbacks=[rates])
    for a, b in zip(model.get_weights(), once.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(TypeError, match="float `learning_rate`"):
        Optimizer(adamfn.adam(1.0)).learning_rate = 0.1


def test_what_would_be_ignored_is_refused():
    with pytest.raises(TypeError, match=r"Optimizer: tx is .*; expected a transformation"):
        Optimizer(adamfn.adam)
    with pytest.raises(ValueError, match=r"weight_decay is 0\.1; .*adamfn\.adamw"):
        Optimizer(adamfn.adam(), weight_decay=0.1)
    with pytest.raises(TypeError, match=r"learning_rate=0\.1, which no part of the chain takes"):
        Optimizer(adamfn.scale_by_moments(), learning_rate=0.1)
    a, b = (keras.Variable(np.ones(2), name=name) for name in "ab")
    optimizer = Optimizer(adamfn.adam())
    optimizer.build([a, b])
    with pytest.raises(ValueError, match="found no gradient of b"):
        optimizer.apply([a.value], [a])
    with pytest.raises(ValueError, match="found variables a, a; expected a path for each"):
        Optimizer(adamfn.adam()).build([a, keras.Variable(np.ones(2), name="a")])


def test_bfloat16_weights_train_as_float32_ones_do():
    """Under Keras's own Adam no weight moves.

    Its decays have the weights' dtype. In bfloat16, 0.999 is 1, and the correction sqrt(1 - b2^t)
    is 0. If that is mended, say so in docs/sixteen_bit_weights.md.
    """
    losses, moved = {}, {}
    for name, dtype, optimizer in (
        ("float32", "float32", Optimizer(adamfn.adam(0.03))),
        ("Keras", "bfloat16", keras.optimizers.Adam(0.03)),
        ("24 bits", "bfloat16", Optimizer(adamfn.chain(adamfn.adam(0.03), adamfn.round_weights()))),
    ):
        model = network(optimizer, units=4, dtype=dtype)
        before = model.layers[0].get_weights()
        losses[name] = fit(model, epochs=100).history["loss"]
        after = model.layers[0].get_weights()
        moved[name] = [np.mean(a != b) for a, b in zip(before, after, strict=True)]
    assert losses["float32"][-1] < 0.01 * losses["float32"][0]
    assert losses["24 bits"][-1] < 0.01 * losses["24 bits"][0]
    assert moved["Keras"] == [0, 0]
