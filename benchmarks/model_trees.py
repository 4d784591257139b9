"""The parameter trees that the benchmarks run over, as shapes."""

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


def abstract(shapes: Shapes) -> dict:
    """The tree as float32 `ShapeDtypeStruct`s."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
