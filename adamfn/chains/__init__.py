"""Chains of stages: transformations, and steps over trees."""
