"""Answers."""

from adamfn.formats.blockmean import BlockMean
from adamfn.formats.blockwise import Blockwise
from adamfn.formats.factored import Factored
from adamfn.formats.pair import Pair


def answer(format, name):
    if name == "stores_rows":
        if isinstance(format, Blockwise):
            return True
        return (
            isinstance(format, Pair)
            and not isinstance(format.nu, Factored)
            and not (isinstance(format.nu, BlockMean) and format.nu.axis != -1)
        )
    raise KeyError(name)
