"""A package of one plugin and one recipe. This file stays light: `verl-plugins list` imports it."""

from pathlib import Path

RECIPES = Path(__file__).parent / "recipes"
