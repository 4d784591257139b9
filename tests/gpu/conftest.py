# SPDX-License-Identifier: Apache-2.0
"""Kernels run by the GPU at hand: `make test-gpu`. Nothing else collects them."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.append(str(Path(__file__).parents[1]))


def pytest_configure(config):
    if jax.default_backend() != "gpu":
        pytest.exit(f"JAX found no GPU here, only {jax.default_backend()}", returncode=2)
