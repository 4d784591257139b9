"""Stages: one file each, with its formula, what it keeps and its docstring."""
