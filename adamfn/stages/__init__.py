"""Stages: their arguments, what they keep, and the scalars of their formulas."""
