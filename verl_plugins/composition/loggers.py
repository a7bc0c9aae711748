"""verl's loggers (`trainer.logger`): whether they can start, the name of the run there, and where their files go."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig, open_dict

from verl_plugins.composition.compose import Composed
from verl_plugins.errors import CompositionError, nearest

PACKAGES = {
    "console": "",
    "file": "orjson",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "trackio": "trackio",
    "clearml": "clearml",
    "vemlp_wandb": "volcengine_ml_platform",
    "rl_insight": "rl_insight",
}
"""What verl can log to, and the module that each needs."""
PROJECT = "verl-plugins"


def check_loggers(config: DictConfig) -> None:
    """CompositionError if a logger does not exist or its package is not installed."""
    for name in _loggers(config):
        if name not in PACKAGES:
            raise CompositionError(f"trainer.logger has {name!r}{nearest(name, PACKAGES)}")
        if PACKAGES[name] and find_spec(PACKAGES[name]) is None:
            raise CompositionError(
                f"trainer.logger has {name!r}, whose package is not installed: pip install {PACKAGES[name]}, or leave "
                "it out, as in trainer.logger=[console]"
            )


def name_run(config: DictConfig, composed: Composed, out: Path) -> None:
    """Give loggers a project and the run folder's name, in place, where neither user, preset nor recipe named them."""
    names = {"project_name": PROJECT, "experiment_name": out.name}
    said = {text.lstrip("+~").partition("=")[0] for text in composed.overrides}
    with open_dict(config):
        for key, value in names.items():
            if f"trainer.{key}" not in said and config.trainer[key] == composed.defaults.trainer[key]:
                config.trainer[key] = value


def places(config: DictConfig, out: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that put the loggers' files into the run folder; what the user has set stays."""
    wanted = {
        "tensorboard": {"TENSORBOARD_DIR": out / "tensorboard"},
        "wandb": {"WANDB_DIR": out},
        "swanlab": {"SWANLAB_LOG_DIR": out / "swanlog"},
        "mlflow": {"MLFLOW_TRACKING_URI": f"sqlite:///{out / 'mlflow.db'}"},
        "file": {} if "VERL_FILE_LOGGER_ROOT" in environment else {"VERL_FILE_LOGGER_PATH": _fresh(out)},
    }
    found = {key: str(value) for name in _loggers(config) for key, value in wanted.get(name, {}).items()}
    return {key: value for key, value in found.items() if key not in environment}


def _fresh(out: Path) -> Path:
    """verl empties the file it opens, so a resumed run takes another one."""
    number = 1
    while (file := out / f"verl_metrics{f'_{number}' if number > 1 else ''}.jsonl").exists():
        number += 1
    return file


def _loggers(config: DictConfig) -> list[str]:
    asked = config.trainer.logger
    return [asked] if isinstance(asked, str) else [str(name) for name in asked or ()]
