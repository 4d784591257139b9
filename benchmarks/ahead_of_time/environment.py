# SPDX-License-Identifier: Apache-2.0
"""How JAX is started where only compilers are wanted: before anything else imports it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def prepare() -> None:
    """Imports JAX so that it computes on CPU, and its plugins look for no device."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no two compilers share a device
    with quiet():
        import jax.numpy  # noqa: F401


@contextmanager
def quiet() -> Iterator[None]:
    """Hides what native code prints, such as plugins' laments that there is no device."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
