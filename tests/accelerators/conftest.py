# SPDX-License-Identifier: Apache-2.0
"""Programs compiled for a TPU or a GPU that is not at hand: `make test-accelerators`.

They need that machine's compiler, in an environment of its own, so nothing else collects them.
"""

import functools
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from ahead_of_time import environment

environment.prepare()

import jax  # noqa: E402
from ahead_of_time import candidates, cost, machines, trees  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--machine", default="v5e", help="whose compiler is asked, such as v5e, h100")


def pytest_configure(config):
    config.addinivalue_line("markers", "quick: the choice that make test-accelerators-quick runs")


@pytest.fixture(scope="session")
def machine(request):
    try:
        return machines.machine(request.config.option.machine)
    except machines.UnavailableError as error:
        pytest.exit(str(error), returncode=2)


@pytest.fixture(scope="session")
def measure_chain(machine):
    """The cost of a step of a chain over a tree of these shapes and this dtype."""

    def measured(tx, shapes, dtype="float32", way="step"):
        candidate = {"step": candidates.by_step, "update": candidates.by_update}[way](tx)
        chip = cost.one_chip(machine)
        params = cost.on(chip, trees.abstract(shapes, dtype))
        state = cost.on(chip, jax.eval_shape(tx.init, params))
        return cost.cost(candidate.step, params, state, params, machine)

    return measured


@pytest.fixture(scope="session")
def measure(measure_chain):
    """The cost of a step of Adam over one leaf, or over a tree, of this shape and dtype."""

    @functools.cache
    def one_leaf(way, moments, shape, dtype, bits):
        return measured(way, moments, {"leaf": shape}, dtype, bits)

    def measured(way, moments, shapes, dtype, bits):
        import adamfn

        tx = adamfn.adam(1e-3, moments=moments)
        tx = tx if bits is None else adamfn.chain(tx, adamfn.round_weights(bits))
        return measure_chain(tx, shapes, dtype, way)

    def call(way, moments, shapes, dtype="float32", bits=None):
        if isinstance(shapes, tuple):
            return one_leaf(way, moments, shapes, dtype, bits)
        return measured(way, moments, shapes, dtype, bits)

    return call
