# SPDX-License-Identifier: Apache-2.0
"""The parameter trees that the benchmarks run over, as shapes."""

from itertools import pairwise

import jax
import jax.numpy as jnp

Shapes = dict[str, "Shapes"] | dict[str, tuple[int, ...]]


def thousand_leaves() -> Shapes:
    """A thousand vectors of a thousand numbers."""
    return {f"leaf_{i:03d}": (1000,) for i in range(1000)}


def gpt2_small() -> Shapes:
    """GPT-2 small: 148 leaves, 124M parameters (Radford et al., 2019)."""
    width, vocabulary, context, layers = 768, 50257, 1024, 12

    def norm() -> Shapes:
        return {"scale": (width,), "bias": (width,)}

    def dense(inputs: int, outputs: int) -> Shapes:
        return {"kernel": (inputs, outputs), "bias": (outputs,)}

    def block() -> Shapes:
        return {
            "norm_1": norm(),
            "attention": {"qkv": dense(width, 3 * width), "out": dense(width, width)},
            "norm_2": norm(),
            "mlp": {"up": dense(width, 4 * width), "down": dense(4 * width, width)},
        }

    return {
        "token_embedding": (vocabulary, width),
        "position_embedding": (context, width),
        **{f"block_{i}": block() for i in range(layers)},
        "final_norm": norm(),
    }


def resnet50() -> Shapes:
    """ResNet-50: 161 leaves, 26M parameters (He et al., 2016)."""

    def norm(width: int) -> Shapes:
        return {"scale": (width,), "bias": (width,)}

    def convolution(size: int, inputs: int, outputs: int) -> Shapes:
        return {"kernel": (size, size, inputs, outputs), "norm": norm(outputs)}

    def block(inputs: int, width: int) -> Shapes:
        return {
            "reduce": convolution(1, inputs, width),
            "middle": convolution(3, width, width),
            "expand": convolution(1, width, 4 * width),
        }

    tree, inputs = {"stem": convolution(7, 3, 64)}, 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        tree[f"shortcut_{stage}"] = convolution(1, inputs, 4 * width)
        for i in range(blocks):
            tree[f"stage_{stage}_block_{i}"] = block(inputs, width)
            inputs = 4 * width
    return {**tree, "classifier": {"kernel": (inputs, 1000), "bias": (1000,)}}


def mixture_of_experts() -> Shapes:
    """Eight layers of eight experts, which are stacked: 83 leaves, 489M parameters."""
    width, experts = 1024, 8

    def layer() -> Shapes:
        return {
            "attention_norm": (width,),
            "query": (width, width),
            "key": (width, width // 4),
            "value": (width, width // 4),
            "out": (width, width),
            "mlp_norm": (width,),
            "router": (width, experts),
            "gate": (experts, width, 2 * width),
            "up": (experts, width, 2 * width),
            "down": (experts, 2 * width, width),
        }

    layers = {f"layer_{i}": layer() for i in range(8)}
    return {"embedding": (32000, width), **layers, "norm": (width,), "head": (width, 32000)}


def mlp() -> Shapes:
    """A small classifier: eight dense layers, 16 leaves, 0.5M parameters."""
    widths = [256] * 8 + [10]
    return {
        f"dense_{i}": {"kernel": (inputs, outputs), "bias": (outputs,)}
        for i, (inputs, outputs) in enumerate(pairwise(widths))
    }


def one_leaf(elements: int = 2**25) -> Shapes:
    """One vector."""
    return {"leaf": (elements,)}


def abstract(shapes: Shapes) -> dict:
    """The tree as float32 `ShapeDtypeStruct`s."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
