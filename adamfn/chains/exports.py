"""The types of states that `jax.export` writes and reads with the programs that it exports."""

from jax import export

from adamfn.chains.layout import Packed
from adamfn.core.stage import CountedState, EmptyState
from adamfn.formats.eight_bit import EightBitScales
from adamfn.formats.factored import Factors
from adamfn.formats.four_bit import FourBitScales
from adamfn.stages.infinity import ScaleByInfinityMomentsState
from adamfn.stages.learning_rate import ScaleByLrState
from adamfn.stages.maximum import ScaleByMaxMomentsState
from adamfn.stages.nesterov import ScaleByNesterovMomentsState
from adamfn.stages.norm_clipping import ClipByGlobalNormState
from adamfn.stages.round_weights import RoundWeightsState
from adamfn.stages.skipping import SkipOutliersState
from adamfn.stages.two_moments import ScaleByMomentsState

_TYPES = (
    ClipByGlobalNormState,
    CountedState,
    EightBitScales,
    EmptyState,
    Factors,
    FourBitScales,
    Packed,
    RoundWeightsState,
    ScaleByInfinityMomentsState,
    ScaleByLrState,
    ScaleByMaxMomentsState,
    ScaleByMomentsState,
    ScaleByNesterovMomentsState,
    SkipOutliersState,
)


def register() -> None:
    """Tells `jax.export` of them."""
    for state in _TYPES:
        export.register_namedtuple_serialization(state, serialized_name=f"adamfn.{state.__name__}")
