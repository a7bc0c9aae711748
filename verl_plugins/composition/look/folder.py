"""The run folder: what a command asks for is what is trained, and `config.yaml` says what made everything beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from verl_plugins.composition.look.words import short
from verl_plugins.errors import CompositionError

CONFIG_FILE, METRICS_FILE = "config.yaml", "metrics.jsonl"
MARKER = "latest_checkpointed_iteration.txt"
DECIDED_LATER = (
    "trainer.default_local_dir",
    "reward.reward_manager",
    "actor_rollout_ref.actor.optim.total_training_steps",
)
"""Keys that the run itself enters."""
HARMLESS = (
    *(f"trainer.{name}" for name in ("total_training_steps", "total_epochs", "logger", "test_freq", "save_freq")),
    *(f"trainer.{name}" for name in ("val_before_train", "val_only", "log_val_generations", "project_name")),
    *(f"trainer.{name}" for name in ("experiment_name", "rollout_data_dir", "validation_data_dir", "resume_mode")),
    *(f"trainer.{name}" for name in ("resume_from_path", "max_actor_ckpt_to_keep", "max_critic_ckpt_to_keep")),
    *("data.val_files", "data.val_max_samples", "data.dataloader_num_workers", "data.filter_overlong_prompts_workers"),
    *("ray_kwargs", "global_profiler", "reward.num_workers", "actor_rollout_ref.rollout.agent.num_workers"),
    *("actor_rollout_ref.rollout.gpu_memory_utilization", "transfer_queue"),
)
"""What may change from one start of a run to the next without changing what is trained."""
IDENTITY = ("actor_rollout_ref.model", "critic.model", "data", "plugins", "algorithm", "reward", "cpu")
"""What makes a run this run and not another; all else that changes on resuming is said."""
SHOWN = 4
SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
ABSENT = "nothing"


def look_at_folder(config: DictConfig, out: Path) -> list[str]:
    """Sentences on what a run in folder `out` would go on with.

    Raises:
        CompositionError: if the folder holds another run's results, or cannot be resumed as asked.
    """
    _look_at_resume_path(config.trainer)
    found = _checkpoints(out)
    if not out.is_dir() or not (found or (out / METRICS_FILE).is_file()):
        return []
    changed = dict(
        _changes(_read(out / CONFIG_FILE), OmegaConf.to_container(config, resolve=False, throw_on_missing=False))
    )
    resumes = bool(found) and config.trainer.resume_mode != "disable"
    other = {key: values for key, values in changed.items() if not resumes or _under(key, IDENTITY)}
    if other:
        holds = "a run" if found else "the metrics of a run without checkpoint"
        raise CompositionError(
            f"--out {out} holds {holds} with other settings ({_shown(other)}): give the same settings, or another --out"
        )
    if changed:
        return [f"resuming with other settings than before: {_shown(changed)}"]
    return []


def keep_config(out: Path, text: str) -> None:
    """Write `config.yaml`; one that says something else is kept beside it as `config-1.yaml`, `config-2.yaml`, …"""
    file = out / CONFIG_FILE
    if _checkpoints(out) and file.is_file() and file.read_text(encoding="utf-8") != text:
        number = 1 + sum(1 for _ in out.glob("config-*.yaml"))
        file.rename(out / f"config-{number}.yaml")
    file.write_text(text, encoding="utf-8")


def _checkpoints(out: Path) -> bool:
    return (out / MARKER).is_file() or any(out.glob("global_step_*"))


def _look_at_resume_path(trainer: DictConfig) -> None:
    mode, path = trainer.resume_mode, trainer.get("resume_from_path")
    if mode not in ("auto", "disable", "resume_path"):
        raise CompositionError(f"trainer.resume_mode is {mode!r}: it must be auto, disable or resume_path")
    if mode != "resume_path":
        return
    if not path:
        raise CompositionError(
            "trainer.resume_mode is 'resume_path' and trainer.resume_from_path is not set: set "
            "trainer.resume_from_path=…/global_step_N"
        )
    if not re.fullmatch(r"global_step_\d+", Path(path).name) or not Path(path).is_dir():
        raise CompositionError(
            f"trainer.resume_from_path: {path} is not the folder of a checkpoint; set "
            f"trainer.resume_from_path=…/global_step_N"
        )


def _read(file: Path) -> dict[str, Any]:
    mend = "give another --out"
    try:
        tree = SafeLoader(file.read_text(encoding="utf-8")).get_single_data()
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CompositionError(
            f"--out {file.parent} holds a run whose {file.name} cannot be read ({short(error)}): {mend}"
        ) from error
    if not isinstance(tree, dict):
        raise CompositionError(f"--out {file.parent} holds a run whose {file.name} is not a configuration: {mend}")
    return tree


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    one, other = dict(_leaves(before)), dict(_leaves(now))
    for key in {**one, **other}:
        values = one.get(key, ABSENT), other.get(key, ABSENT)
        left_open = other.get(key) == "???" or (key == "data.seed" and other.get(key) is None)
        if not (_same(*values) or left_open or _under(key, DECIDED_LATER + HARMLESS)):
            yield key, values


def _leaves(tree: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{above}.{key}" if above else str(key))
    else:
        yield above, tree


def _same(one: Any, other: Any) -> bool:
    """Numbers are compared as numbers: YAML and Hydra read `1e-6` differently."""
    try:
        return one == other or float(one) == float(other)
    except (TypeError, ValueError):
        empty = ({}, [], None, ABSENT)
        return one in empty and other in empty


def _under(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _shown(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """`key 1 -> 2`, those that matter most first."""
    order = sorted(changed, key=lambda key: not _under(key, IDENTITY))
    parts = [f"{key} {changed[key][0]} -> {changed[key][1]}" for key in order[:SHOWN]]
    more = [f"{len(order) - SHOWN} more"] if len(order) > SHOWN else []
    return ", ".join(parts + more)
