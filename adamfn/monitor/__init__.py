"""Seeing inside a run: what every layer does while it trains, and what is wrong with it.

`step`, or `observe` before a step, measures every layer; `faults`, `report`, `picture` and `flat`
show it.
"""

from adamfn.monitor.faults import WORDS, Fault, faults
from adamfn.monitor.looks import flat, looks
from adamfn.monitor.observing import Observation, observe
from adamfn.monitor.pictures import picture, report
from adamfn.monitor.stepping import step

__all__ = [
    "WORDS",
    "Fault",
    "Observation",
    "faults",
    "flat",
    "looks",
    "observe",
    "picture",
    "report",
    "step",
]
