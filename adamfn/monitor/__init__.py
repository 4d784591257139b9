"""Seeing inside a run: what every layer does, and what is wrong with it."""

from adamfn.monitor.observing import Observation, observe

__all__ = ["Observation", "observe"]
