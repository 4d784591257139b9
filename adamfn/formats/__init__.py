"""Formats: how Adam's two moments are stored between steps. `names.FORMATS` lists them."""

from adamfn.formats.arrangement import describe
from adamfn.formats.blocks import Blockwise
from adamfn.formats.codecs import Codec, Encoded, Exact, Linear, Pair, Rounded
from adamfn.formats.format import BaseFormat, Format, Stored
from adamfn.formats.levels import EightBit, FourBit
from adamfn.formats.means import BlockMean, Factored
from adamfn.formats.names import FORMATS, Moments, check_moments, choose_formats, get
from adamfn.formats.noise import noise

__all__ = [
    "FORMATS", "BaseFormat", "BlockMean", "Blockwise", "Codec", "EightBit", "Encoded", "Exact",
    "Factored", "Format", "FourBit", "Linear", "Moments", "Pair", "Rounded", "Stored",
    "check_moments", "choose_formats", "describe", "get", "noise",
]  # fmt: skip
