"""Formats: how Adam's two moments are stored between steps.

Bytes are those of GPT-2 small, small leaves in float32 included.

| name       | bytes a parameter | what is stored                                              |
|------------|-------------------|-------------------------------------------------------------|
| `float32`  | 8                 | both moments as they are                                    |
| `bfloat16` | 4                 | both in bfloat16                                            |
| `8bit`     | 2.05              | a byte each, by blocks of 256                               |
| `4bit`     | 1.10              | one byte for both, by blocks of 128                         |
| `factored` | 1.03              | mu in a byte, by blocks of 256; nu's row and column means   |
| `blockmean`| 1.03              | mu likewise; nu's means over the last axis                  |
"""

from adamfn.formats.base import Format, Stored, noise
from adamfn.formats.bfloat16 import Rounded
from adamfn.formats.blockmean import BlockMean
from adamfn.formats.blockwise import Blockwise
from adamfn.formats.choice import Moments, check_moments, choose_formats
from adamfn.formats.codec import Codec, Encoded
from adamfn.formats.description import describe
from adamfn.formats.eight_bit import EightBit
from adamfn.formats.factored import Factored
from adamfn.formats.float32 import Exact
from adamfn.formats.four_bit import FourBit
from adamfn.formats.linear import Linear
from adamfn.formats.names import FORMATS, get
from adamfn.formats.pair import Pair

__all__ = [
    "FORMATS",
    "BlockMean",
    "Blockwise",
    "Codec",
    "EightBit",
    "Encoded",
    "Exact",
    "Factored",
    "Format",
    "FourBit",
    "Linear",
    "Moments",
    "Pair",
    "Rounded",
    "Stored",
    "check_moments",
    "choose_formats",
    "describe",
    "get",
    "noise",
]
