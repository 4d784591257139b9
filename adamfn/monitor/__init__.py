"""Seeing inside a run: figures of every layer while it trains, and what is wrong with it.

`step`, or `observe` before a step, measures every layer; the other functions show the result.
"""

from adamfn.monitor.observing import Observation, observe, step
from adamfn.monitor.reading import WORDS, Fault, faults, flat, looks, picture, report

__all__ = ["WORDS", "Fault", "Observation", "faults", "flat", "looks"]
__all__ += ["observe", "picture", "report", "step"]
