# SPDX-License-Identifier: Apache-2.0
"""`with_backend`: a transformation that a given backend runs."""

from adamfn.backends.primitive import BACKENDS, Backend
from adamfn.chains.chain import Wrapped, chain_of
from adamfn.chains.transform import GradientTransformation, check_transformation
from adamfn.trees import shown


def with_backend(tx: GradientTransformation, backend: Backend) -> GradientTransformation:
    """The same transformation, run by a given backend.

    Args:
      tx: a recipe, a chain of stages, or what `packed` made of one.
      backend: `"auto"`, the fastest one on each platform; `"xla"`, no native code and no kernel;
        `"pallas"`, Pallas kernels even where XLA makes one kernel by itself, and interpreted (which
        is slow) on CPU; or `"mosaic_gpu"`, these, on GPUs of compute capability 9.0 and later those
        by Mosaic in place of Triton.

    Returns:
      A `GradientTransformation` with the same state. In a `chain` it is not fused with others.

    Raises:
      ValueError: an unknown backend, or a transformation of another library.

    >>> import adamfn
    >>> tx = adamfn.with_backend(adamfn.adam(), "xla")
    """
    if backend not in BACKENDS:
        raise ValueError(f"with_backend: backend is {shown(backend)}; expected one of {BACKENDS}.")
    check_transformation("with_backend: the first argument", tx)
    inner = chain_of(tx)
    if inner is None:
        raise ValueError(f"with_backend: found {shown(tx)}; expected a transformation of adamfn's.")
    return Wrapped(inner, backend=backend).transformation
