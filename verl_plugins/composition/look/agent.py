"""The agent loop of a run and its tools: files that are named are there, and tools that are given are used."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

from verl_plugins.composition.look.words import short
from verl_plugins.errors import CompositionError, nearest

ROLLOUT = "actor_rollout_ref.rollout"
LOOPS, LOOP = f"{ROLLOUT}.agent.agent_loop_config_path", f"{ROLLOUT}.agent.default_agent_loop"
FUNCTIONS, TOOLS = f"{ROLLOUT}.multi_turn.function_tool_path", f"{ROLLOUT}.multi_turn.tool_config_path"
SINGLE_TURN, TOOL_AGENT = "single_turn_agent", "tool_agent"
"""verl's loops; others are named in a file of `agent_loop_config_path`, or registered by an imported module."""


def look_at_agent(config: DictConfig, named_by_rows: bool) -> None:
    """Enters in `config` the files' paths as every process finds them.

    Args:
        named_by_rows: whether the data has a column `agent_name`, which comes before the default.

    Raises:
        CompositionError: a file is not there or is not what it must be, or tools are given to a loop without any.
    """
    names = {SINGLE_TURN, TOOL_AGENT, *_loops(config)}
    loop = OmegaConf.select(config, LOOP)
    if loop not in names and "did you mean" in (hint := nearest(str(loop), names)):
        raise CompositionError(f"{LOOP} is {loop!r}{hint}")
    given = [key for key in (FUNCTIONS, TOOLS) if _file(config, key)]
    for key in given:
        _look_at_tools(key, Path(OmegaConf.select(config, key)))
    if given and loop == SINGLE_TURN and not named_by_rows:
        raise CompositionError(
            f"{given[0]} is set and the agent loop {SINGLE_TURN!r} calls no tools: set {LOOP}={TOOL_AGENT}, or give "
            "the data a column agent_name"
        )


def _file(config: DictConfig, key: str) -> Path | None:
    given = OmegaConf.select(config, key)
    if not given:
        return None
    file = Path(given).expanduser().absolute()
    if not file.is_file():
        raise CompositionError(f"{key}: there is no file {file}; set {key}=… to one, or to null")
    with open_dict(config):
        OmegaConf.update(config, key, str(file))
    return file


def _look_at_tools(key: str, file: Path) -> None:
    if key == TOOLS:
        _yaml(key, file)
        return
    try:
        ast.parse(file.read_text(encoding="utf-8"), filename=file.name)
    except (OSError, SyntaxError, ValueError) as error:
        where = f"{file}, line {error.lineno}," if getattr(error, "lineno", None) else str(file)
        raise CompositionError(f"{key}: {where} is not Python ({short(error)}); mend it") from error


def _loops(config: DictConfig) -> list[str]:
    """Names in the user's file of agent loops."""
    file = _file(config, LOOPS)
    if file is None:
        return []
    found = _yaml(LOOPS, file)
    if not isinstance(found, list) or not all(
        isinstance(one, dict) and {"name", "_target_"} <= one.keys() for one in found
    ):
        raise CompositionError(f"{LOOPS}: {file} must be a list of mappings with name and _target_; mend it")
    return [str(one["name"]) for one in found]


def _yaml(key: str, file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CompositionError(f"{key}: {file} is not YAML ({short(error)}); mend it") from error
