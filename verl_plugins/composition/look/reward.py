"""Who scores the answers of a run, and what that asks of the data's ground truth."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_plugins.composition.look.words import short
from verl_plugins.composition.manager import Plugins
from verl_plugins.errors import CompositionError, nearest
from verl_plugins.hookspecs import STAGES

STAGE = "score_answer"
FUNCTION = "reward.custom_reward_function"
REWARD_MODEL = "reward.reward_model"
EXECUTED = ("numina_", "codecontests", "apps", "codeforces", "taco")
"""Beginnings of the sources whose answers verl's own reward function evaluates or executes."""
OLD_KEYS = {
    "custom_reward_function": "reward.custom_reward_function",
    "reward_model.model.path": "reward.reward_model.model_path",
    "reward_model.reward_manager": "reward.reward_manager.name",
    "reward_model.num_workers": "reward.num_workers",
    "reward_model": "reward.reward_model",
    "sandbox_fusion": "reward.sandbox_fusion",
}
"""Sections verl's own command still accepts, and where their keys are now."""


@dataclass(frozen=True)
class Labels:
    """What the scorer and the plugins ask of the column `reward_model`."""

    who: str
    """Who compares answers with the ground truth."""
    train: bool
    val: bool
    plain: bool
    """Whether the ground truth must be a text or number that answers something."""
    by_source: bool
    """Whether verl's own function scores, in a way that depends on `data_source`."""

    def needed(self, key: str) -> bool:
        """Whether the files of `data.train_files` or `data.val_files` need a ground truth."""
        return self.train if key == "data.train_files" else self.val

    def mend(self, key: str) -> str:
        """What else can be done about data without it."""
        if key == "data.val_files":
            return (
                "or train without validation with data.val_files=null trainer.val_before_train=false "
                "trainer.test_freq=-1"
            )
        return "or choose a recipe that needs no labels, such as ttrl"


def users_scorer(config: DictConfig) -> str:
    """The key of a scorer of the user's that takes the place of plugins, or ''."""
    if OmegaConf.select(config, f"{FUNCTION}.path"):
        return f"{FUNCTION}.path"
    return f"{REWARD_MODEL}.enable" if OmegaConf.select(config, f"{REWARD_MODEL}.enable") else ""


def giving_way(config: DictConfig, plugins: Plugins) -> list[str]:
    """Plugins that only score by default, where the user names a scorer: they are left out of the run.

    Raises:
        CompositionError: if the user names one and a plugin that is no default scores as well.
    """
    key = users_scorer(config)
    if not key:
        return []
    for name, kind in plugins.of_stage(STAGE):
        if kind != "default":
            off = f"{FUNCTION}.path=null" if key.startswith(FUNCTION) else f"{key}=false"
            raise CompositionError(
                f"{key} is set and plugin {name!r} scores answers too (stage {STAGE}): leave one out, as in {off} or "
                f"~plugins.{name}"
            )
    defaults = [name for name, _ in plugins.of_stage(STAGE)]
    acting = [name for stage in STAGES if stage != STAGE for name, _ in plugins.of_stage(stage)]
    return [name for name in defaults if name not in acting]


def look_at_reward(config: DictConfig, plugins: Plugins) -> tuple[str, Labels]:
    """One line on who scores, and what that asks of the data.

    Raises:
        CompositionError: if a function or model that is to score is not there, or is named under an old key.
    """
    _refuse_old_keys(config)
    free = [plugin.name for plugin in plugins if plugin.label_free]
    key = users_scorer(config)
    if key.startswith(FUNCTION):
        section = OmegaConf.select(config, FUNCTION)
        _look_at_function(section.path, section.name)
        who = f"the function {section.name} of {section.path}"
        return f"reward: {who}", Labels(who, True, True, plain=False, by_source=False)
    if key:
        path = config.reward.reward_model.model_path
        if not path:
            raise CompositionError(
                f"{key} is true and {REWARD_MODEL}.model_path is not set: set {REWARD_MODEL}.model_path=…"
            )
        return f"reward: the model {path}", Labels(str(path), False, False, plain=False, by_source=False)
    scoring = [name for name, kind in plugins.of_stage(STAGE) if kind != "wraps"]
    if scoring:
        chosen = next(plugin for plugin in plugins if plugin.name == scoring[0])
        who, default = f"plugin {chosen.name}", scoring[0] == "math_verify"
        labels = Labels(who, not free, not chosen.label_free, plain=default, by_source=False)
        return f"reward: {who}" + (f"; plugin {free[0]} needs no labels" if free else ""), labels
    who = "verl's own reward function"
    return f"reward: {who}, by data_source", Labels(who, not free, True, plain=False, by_source=True)


def source_fault(sources: Collection[Any], labels: Labels) -> str:
    """What is wrong with the data's sources where verl's own function scores."""
    if not labels.by_source:
        return ""
    mend = (
        "let a plugin score with +plugins.math_verify={}, or a function of yours with "
        "reward.custom_reward_function.path=…"
    )
    for source in sorted(map(str, sources)):
        if source.startswith(EXECUTED):
            return (
                f"has the data_source {source!r}, for which verl's own reward function executes what the model "
                f"answers: {mend}"
            )
        exact, beginnings = _known_sources()
        if not (source in exact or source.startswith(tuple(beginnings))):
            return f"has the data_source {source!r}, which verl's own reward function cannot score: {mend}"
    return ""


@cache
def _known_sources() -> tuple[frozenset[str], frozenset[str]]:
    """Names, and beginnings of names, that verl's `default_compute_score` compares `data_source` with."""
    spec = find_spec("verl")
    file = Path(spec.submodule_search_locations[0]) / "utils" / "reward_score" / "__init__.py"
    exact, beginnings = set(), set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == "data_source":
            exact |= set(_texts(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "data_source.startswith":
            beginnings |= set(_texts(node))
    return frozenset(exact), frozenset(beginnings)


def _texts(node: ast.AST) -> Iterator[str]:
    return (part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str))


def _refuse_old_keys(config: DictConfig) -> None:
    for old, new in OLD_KEYS.items():
        section = OmegaConf.select(config, old)
        whole = OmegaConf.to_container(section) if OmegaConf.is_config(section) else section
        for path, value in _leaves(whole, old):
            if value is not None:
                key = path.replace(old, new, 1)
                raise CompositionError(f"{path} is an old name of verl's that nothing reads here: set {key}={value}")


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    else:
        yield path, value


def _look_at_function(path: str, name: str) -> None:
    """The file is there, can be read, and says something called `name`; it is not executed."""
    key = f"{FUNCTION}.path"
    if path.startswith("pkg://"):
        module = path.removeprefix("pkg://").replace("/", ".")
        try:
            there = find_spec(module)
        except (ImportError, ValueError):
            there = None
        if there is None:
            raise CompositionError(f"{key}: there is no module {module}; set {key}=… to a Python file or pkg://module")
        return
    file = Path(path.removeprefix("file://"))
    if not file.is_file():
        raise CompositionError(f"{key}: there is no file {file}; set {key}=… to the Python file of the function")
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"), filename=file.name)
    except (OSError, SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"{file}, line {line}," if line else str(file)
        raise CompositionError(f"{key}: {where} is not Python ({short(error)}); mend it") from error
    names = set(_defined(tree))
    if name not in names and "*" not in names:
        raise CompositionError(
            f"{FUNCTION}.name: {file} has no function {name!r}{nearest(name, names)}, set {FUNCTION}.name=…"
        )


def _defined(tree: ast.Module) -> Iterator[str]:
    """Names a module binds at its top, inside of `if` and `try` as well; '*' where it imports all of another."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
