# SPDX-License-Identifier: Apache-2.0
"""Stages: their arguments, what they keep, and the scalars of their formulas."""
