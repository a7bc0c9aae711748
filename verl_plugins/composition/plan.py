"""What a dry run prints: the composed configuration and who acts on each stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf

from verl_plugins.composition.compose import Composed
from verl_plugins.composition.manager import Plugins
from verl_plugins.hookspecs import STAGES


def plan(composed: Composed, plugins: Plugins, seen: Sequence[str] = (), *, full: bool = False) -> str:
    """YAML of what differs from verl's defaults (or of everything), the stages in the order they run, what was seen."""
    config = OmegaConf.to_container(composed.config, resolve=False)
    shown = config if full else difference(config, OmegaConf.to_container(composed.defaults, resolve=False))
    names = f"# recipe {composed.recipe}" + (f", preset {composed.preset}" if composed.preset else "")
    tree = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
    told = ["# looked at", *(f"#   {line}" for line in seen)] if seen else []
    return "\n".join([names, tree, "# stages, in the order they run", *_stages(plugins), *told, ""])


def difference(tree: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What of a nested mapping is not in `defaults`, or is there with another value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        before = defaults.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            if inner := difference(value, before):
                found[key] = inner
        elif key not in defaults or value != before:
            found[key] = value
    return found


def _stages(plugins: Plugins) -> list[str]:
    lines = []
    for stage in STAGES:
        acting = ", ".join(f"{name} ({kind})" for name, kind in plugins.of_stage(stage))
        lines += [f"#   {stage}: {acting}"] if acting else []
    return lines
