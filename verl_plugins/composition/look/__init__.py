"""The look at a run before anything starts, shared by `run`, `--dry-run` and `doctor`: its reward, model and data.

Each part raises CompositionError, one sentence, for what the run could not do or would do differently than asked.
Nothing here imports verl, and transformers is imported when a model is looked at.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from verl_plugins.composition.cache import find_room_for_datasets
from verl_plugins.composition.compose import Composed
from verl_plugins.composition.look.agent import look_at_agent
from verl_plugins.composition.look.data import Found, look_at_data
from verl_plugins.composition.look.folder import look_at_folder
from verl_plugins.composition.look.model import PATH, look_at_model
from verl_plugins.composition.look.reward import look_at_reward
from verl_plugins.composition.look.teacher import look_at_teacher
from verl_plugins.composition.manager import Plugins
from verl_plugins.composition.scratch import no_folder_of_the_compiler

__all__ = ["look", "look_at_data", "look_at_folder", "look_at_model", "look_at_reward", "made_by_preset"]


def look(composed: Composed, plugins: Plugins, out: Path | None = None) -> list[str]:
    """One line each on reward, model and data, and on the run folder if it is given and holds a run.

    Enters in `composed.config` what follows from the model, and paths as verl takes them.

    Raises:
        CompositionError: what the run could not do or would do differently than asked.
        RunError: there is no folder for what is read of data.
    """
    config = composed.config
    find_room_for_datasets()
    reward, labels = look_at_reward(config, plugins)
    with no_folder_of_the_compiler(), made_by_preset(composed) as made:
        model, found = None, []
        if not OmegaConf.is_missing(config.actor_rollout_ref.model, "path"):
            model = look_at_model(config, made.get(PATH))
        teachers = look_at_teacher(config, model, made)
        if not any(OmegaConf.is_missing(config.data, name) for name in ("train_files", "val_files")):
            found = look_at_data(config, model, labels, made)
        look_at_agent(config, named_by_rows=any(one.names_loop or one.unread for one in found))
        folder = look_at_folder(config, out) if out is not None else []
    seen = f"model: {model}" if model else "model: not looked at before the run"
    return [reward, seen, *teachers, *(described(one, config) for one in found), *folder]


@contextmanager
def made_by_preset(composed: Composed) -> Iterator[dict[str, Path]]:
    """What the preset makes is entered in `composed.config`; yields where to look at it, per key."""
    if not composed.sketch:
        yield {}
        return
    module, _, function = composed.sketch.partition(":")
    with getattr(importlib.import_module(module), function)(composed.config) as made:
        yield made


def described(found: Found, config: DictConfig) -> str:
    """One line on the files of a key."""
    name = found.key.removeprefix("data.").removesuffix("_files")
    text = f"data: {name} {', '.join(found.files)}"
    if not found.rows:
        return f"{text}, not looked at before the run"
    text += f", {found.rows:,} rows"
    if found.longest:
        text += f", the longest prompt {found.longest} of {config.data.max_prompt_length} tokens"
    if found.left_out:
        text += f", {found.left_out:,} longer ones left out (data.filter_overlong_prompts)"
    return text + (" (of the longest texts)" if found.sampled else "")
