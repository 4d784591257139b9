# SPDX-License-Identifier: Apache-2.0
"""Seeing inside a run: `step` or `observe` measures every layer; the others show the figures."""

from adamfn.monitor.observing import Observation, observe, step
from adamfn.monitor.reading import WORDS, Fault, faults, flat, looks, picture, report

__all__ = ["WORDS", "Fault", "Observation", "faults", "flat", "looks"]
__all__ += ["observe", "picture", "report", "step"]
