"""The lab that a recipe names: its settings read from the source, its function loaded and called."""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any

from verl_plugins.composition.override import parse
from verl_plugins.composition.recipe import Recipe
from verl_plugins.composition.settings import typed
from verl_plugins.errors import CompositionError
from verl_plugins.lab import Findings, Progress


def load(recipe: Recipe) -> tuple[Callable[..., Findings], type]:
    """The recipe's lab, imported, and the dataclass of its settings."""
    where = f"{recipe.file}: recipe.lab {recipe.lab!r}"
    module, _, name = recipe.lab.partition(":")
    try:
        function = getattr(import_module(module), name)
        kind = typing.get_type_hints(function).get("settings")
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise CompositionError(f"{where} cannot be loaded: {cause}") from error
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise CompositionError(f"{where} must take `settings`, annotated with a dataclass, `seed` and `progress`")
    return function, kind


def run(recipe: Recipe, given: Sequence[str], seed: int, progress: Progress) -> tuple[Any, Findings]:
    """The settings with `given` ones (`key=value`) in place, and what the lab found with them."""
    function, kind = load(recipe)
    settings = typed(kind, given_values(given), recipe.name, "lab")
    found = function(settings, seed, progress)
    if not isinstance(found, Findings):
        other = type(found).__name__
        raise CompositionError(
            f"{recipe.file}: recipe.lab {recipe.lab!r} returned {other}, expected verl_plugins.lab.Findings"
        )
    return settings, found


def given_values(given: Sequence[str]) -> dict[str, Any]:
    """What `--set key=value` says.

    Raises:
        CompositionError: it adds or removes a key, or gives one twice.
    """
    found: dict[str, Any] = {}
    for text in given:
        item = parse(text)
        if item.is_add() or item.is_force_add() or item.is_delete():
            raise CompositionError(f"--set {text}: write key=value, as in --set {item.key_or_group}=1")
        if item.key_or_group in found:
            raise CompositionError(f"--set gives {item.key_or_group} twice: give it once")
        found[item.key_or_group] = item.value()
    return found
