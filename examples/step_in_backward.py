# SPDX-License-Identifier: Apache-2.0
"""Train with the optimizer's step inside the backward pass: one layer's gradients at a time.

The layers of a character transformer are stacked in one array and scanned. The backward pass loops
over them from the last to the first: it computes a layer's gradients, takes the layer's step, and
frees the gradients. The program prints how many bytes this saves, and trains.

    python examples/step_in_backward.py
    python examples/step_in_backward.py --lean     # bfloat16 weights in 24 bits, 8-bit moments

The loop carries weights and state, and writes each layer in place. A `jax.custom_vjp` around the
layer whose "gradients" are the new weights and moments would be shorter. But it keeps old and new
values until its scan ends, which takes more memory than gradients. Also, integers have no
gradients: codes, corrections and counts.

Operations that need all gradients before the first step do not work: clipping by the global norm
(in `tx` it clips each layer by the layer's norm), skipping a step if any gradient is not finite,
averages over several batches.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import char_lm
import jax
import jax.numpy as jnp
import optax

import adamfn

RATE, LAYERS, BATCH, STEPS = 1e-3, 24, 4, 30
Step = Callable[[Any, Any, jax.Array], tuple[Any, Any, jax.Array]]


def optimizer(lean: bool) -> adamfn.GradientTransformation:
    if lean:
        return adamfn.chain(adamfn.adamw(RATE, moments="8bit"), adamfn.round_weights(24))
    return adamfn.adamw(RATE)


def init(key: jax.Array, layers: int, dtype: Any) -> dict:
    """The weights of all layers in one array; separately, the weights before and after them."""
    params = char_lm.init(key, layers)
    params["blocks"] = jax.tree.map(lambda *weights: jnp.stack(weights), *params["blocks"])
    params = jax.tree.map(lambda weight: weight.astype(dtype), params)
    return {"blocks": params.pop("blocks"), "ends": params}


def widened(params: dict) -> dict:
    return jax.tree.map(lambda weight: weight.astype(jnp.float32), params)


def embed(ends: dict, windows: jax.Array) -> jax.Array:
    return widened(ends)["characters"][windows[:, :-1]]


def layer(x: jax.Array, block: dict) -> jax.Array:
    return char_lm.layer(widened(block), x)


def loss_of_last(ends: dict, x: jax.Array, windows: jax.Array) -> jax.Array:
    """The loss, from the output of the last layer."""
    ends = widened(ends)
    logits = char_lm.normalize(x, ends["norm"]) @ ends["characters"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def ordinary_loss(params: dict, windows: jax.Array) -> jax.Array:
    """The loss to differentiate; the backward pass recomputes a layer's activations."""
    again = jax.checkpoint(layer)
    x = embed(params["ends"], windows)
    x, _ = jax.lax.scan(lambda x, block: (again(x, block), None), x, params["blocks"])
    return loss_of_last(params["ends"], x, windows)


def ordinary(tx: adamfn.GradientTransformation) -> Step:
    """Computes all gradients, then takes the step."""

    def train_step(params: dict, state: Any, windows: jax.Array) -> tuple[dict, Any, jax.Array]:
        loss, grads = jax.value_and_grad(ordinary_loss)(params, windows)
        return *adamfn.step(tx, grads, state, params), loss

    return train_step


def init_by_layers(tx: adamfn.GradientTransformation, params: dict) -> dict:
    """The state of `in_backward`: one for each layer, stacked as the layers are."""
    return {"blocks": jax.vmap(tx.init)(params["blocks"]), "ends": tx.init(params["ends"])}


def in_backward(tx: adamfn.GradientTransformation) -> Step:
    """Takes each layer's step as soon as its gradients exist."""

    def train_step(params: dict, state: dict, windows: jax.Array) -> tuple[dict, dict, jax.Array]:
        ends, blocks = params["ends"], params["blocks"]
        x, embed_backward = jax.vjp(lambda ends: embed(ends, windows), ends)
        x, inputs = jax.lax.scan(lambda x, block: (layer(x, block), x), x, blocks)
        loss, backward = jax.vjp(lambda ends, x: loss_of_last(ends, x, windows), ends, x)
        grads, x_grad = backward(jnp.ones_like(loss))

        def one_layer(steps_done: jax.Array, carry: Any) -> Any:
            x_grad, *stacked = carry
            number = len(inputs) - 1 - steps_done
            block, own_state = at(number, stacked)
            _, backward = jax.vjp(layer, inputs[number], block)
            x_grad, block_grads = backward(x_grad)
            moved = adamfn.step(tx, block_grads, own_state, block)
            return x_grad, *written(number, stacked, list(moved))

        carry = jax.lax.fori_loop(0, len(inputs), one_layer, (x_grad, blocks, state["blocks"]))
        x_grad, blocks, block_states = carry
        # The last layer shares the embedding: its two gradients are added.
        grads = jax.tree.map(jnp.add, grads, embed_backward(x_grad)[0])
        ends, end_state = adamfn.step(tx, grads, state["ends"], ends)
        return {"blocks": blocks, "ends": ends}, {"blocks": block_states, "ends": end_state}, loss

    return train_step


def at(number: jax.Array, stacked: Any) -> Any:
    """One layer of a tree of stacked layers."""
    return jax.tree.map(lambda leaf: leaf[number], stacked)


def written(number: jax.Array, stacked: Any, values: Any) -> Any:
    """A tree of stacked layers with one of them replaced, in place inside a loop."""
    return jax.tree.map(lambda leaf, value: leaf.at[number].set(value), stacked, values)


def compiled(tx: adamfn.GradientTransformation, params: dict) -> list[Any]:
    """The ordinary step and the step in the backward pass, compiled. Nothing runs."""
    windows = jax.ShapeDtypeStruct((BATCH, char_lm.CONTEXT + 1), jnp.int32)
    ways = {ordinary: tx.init, in_backward: partial(init_by_layers, tx)}
    return [
        jax.jit(way(tx), donate_argnums=(0, 1))
        .lower(params, jax.eval_shape(init_state, params), windows)
        .compile()
        for way, init_state in ways.items()
    ]


def batch(text: jax.Array, number: int) -> jax.Array:
    where = jax.random.fold_in(jax.random.key(1), number)
    starts = jax.random.randint(where, (BATCH, 1), 0, len(text) - char_lm.CONTEXT)
    return text[starts + jnp.arange(char_lm.CONTEXT + 1)].astype(jnp.int32)


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"({LAYERS})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps ({STEPS})")
    parser.add_argument("--lean", action="store_true", help="weights in 24 bits, 8-bit moments")
    args = parser.parse_args(argv)
    if min(args.steps, args.layers) < 1:
        parser.error(
            f"found {args.steps} steps of {args.layers} layers; expected at least 1 of each"
        )

    tx, dtype = optimizer(args.lean), jnp.bfloat16 if args.lean else jnp.float32
    params = init(jax.random.key(0), args.layers, dtype)
    steps = compiled(tx, params)
    grads = sum(leaf.nbytes for leaf in jax.tree.leaves(params))  # in the dtypes of their weights
    plain, by_layers = (step.memory_analysis().temp_size_in_bytes for step in steps)
    print(f"All gradients take {grads:,} bytes. Besides weights and state, the ordinary step takes")
    print(f"{plain:,} bytes, the step in the backward pass {by_layers:,}: less by")
    print(f"{(plain - by_layers) / grads:.2f} times the gradients.")
    state, train_step = init_by_layers(tx, params), steps[1]
    text, losses = jnp.asarray(char_lm.load()[0]), []
    for number in range(args.steps):
        params, state, loss = train_step(params, state, batch(text, number))
        losses.append(float(loss))
        if (number + 1) % 10 == 0 or number + 1 == args.steps:
            print(f"step {number + 1:4d}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
