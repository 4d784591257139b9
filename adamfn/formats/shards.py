"""How formats store a shard of a leaf, so that all shards together are the leaf as it is stored."""

from collections.abc import Sequence
from dataclasses import replace

from adamfn.formats.base import Format
from adamfn.formats.bfloat16 import Rounded
from adamfn.formats.blockmean import BlockMean
from adamfn.formats.blocks import size_for
from adamfn.formats.blockwise import Blockwise
from adamfn.formats.factored import Factored
from adamfn.formats.float32 import Exact
from adamfn.formats.linear import Linear
from adamfn.formats.means import MeshAxes
from adamfn.formats.pair import Pair


def block_of(format: Format | None) -> int | None:
    """The largest block that a format stores by; 0 for none, None for a format of another's."""
    if format is None:
        return 0
    if isinstance(format, Blockwise):
        own = type(format).encode is Blockwise.encode and type(format).decode is Blockwise.decode
        return format.block if own else None
    if type(format) is not Pair:
        return None
    known = {Exact, Rounded, Linear, Factored, BlockMean}
    codecs = (format.mu, format.nu)
    if not known.issuperset(map(type, codecs)):
        return None
    blocks = {codec.block for codec in codecs if isinstance(codec, Linear)}
    return None if len(blocks) > 1 else max(blocks, default=0)


def with_block(format: Format, block: int) -> Format:
    """The format with another largest block."""
    if isinstance(format, Blockwise):
        return replace(format, block=block)
    assert isinstance(format, Pair)
    mu, nu = (
        replace(codec, block=block) if isinstance(codec, Linear) else codec
        for codec in (format.mu, format.nu)
    )
    return Pair(mu, nu)


def cut_block(block: int, shape: Sequence[int], parts: int) -> int | None:
    """The size of the blocks of a leaf that so many parts of its last axis would cut, if any."""
    if block == 0 or parts == 1:
        return None
    size = size_for(shape[-1], block)
    return size if shape[-1] % parts or shape[-1] // parts % size else None


def on_shards(format: Format | None, split: MeshAxes) -> Format | None:
    """The format for a shard of a leaf, inside `jax.shard_map` over these mesh axes."""
    if isinstance(format, Pair) and isinstance(format.nu, Factored | BlockMean):
        return replace(format, nu=replace(format.nu, split=split))
    return format
