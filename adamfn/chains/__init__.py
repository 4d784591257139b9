# SPDX-License-Identifier: Apache-2.0
"""Chains of stages: transformations, and steps over trees."""
