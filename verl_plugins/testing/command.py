"""`verl-plugins check`: the laws of one installed plugin, in this process and in seconds, before any training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from verl_plugins.composition import manifest, recipe
from verl_plugins.composition.labs import given_values
from verl_plugins.composition.recipe import leaves
from verl_plugins.testing.check import CALL_LAWS, CLASS_LAWS, VARIANTS, PluginCheckError, check_plugin
from verl_plugins.testing.scenario import Scenario


def check(name: str, given: Sequence[str], excused: Sequence[str] = ()) -> int:
    """Print which laws plugin `name` breaks, and return 1 if any but those `excused`.

    Its settings and verl's are those of the recipe of that name, where there is one, and then those `given`.

    Raises:
        CompositionError: there is no such plugin, or what is given is no setting.
    """
    installed = manifest.entries()
    known = manifest.find(name, installed)
    settings, overrides = of_recipe(name, installed)
    config, but = {**settings, **given_values(given)}, dict.fromkeys(excused, "said on the command line")
    begun = time.perf_counter()
    try:
        check_plugin(name, config=config, scenario=Scenario(overrides=overrides), except_for=but)
    except PluginCheckError as error:
        print(error)
        return 1
    stages = ", ".join(hook.stage for hook in known.hooks) or "none"
    laws = ", ".join((*CLASS_LAWS, *CALL_LAWS, *VARIANTS)) + (f", but for {', '.join(excused)}" if excused else "")
    print(f"plugin {name!r} of {known.owner}, stages {stages}: keeps {laws} ({time.perf_counter() - begun:.1f} s)")
    return 0


def of_recipe(name: str, installed: Sequence[manifest.EntryPoint]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the plugin, and verl's by dotted key, in the one usable recipe that is called like it."""
    found = [item for item in recipe.recipes(manifest.folders(installed)) if item.name == name and not item.broken]
    if len(found) != 1:
        return {}, {}
    words = {".".join(key.removeprefix("+") for key in path): value for path, value in leaves(found[0].overrides)}
    return dict(found[0].plugins.get(name) or {}), words
