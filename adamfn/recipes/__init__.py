"""Recipes: optimizers as chains that read as their formulas."""
