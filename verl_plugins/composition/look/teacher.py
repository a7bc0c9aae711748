"""A teacher's model, before anything starts: it is there, and has the student's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from verl_plugins.composition import teacher
from verl_plugins.composition.look.hub import is_name, snapshot
from verl_plugins.composition.look.words import short
from verl_plugins.errors import CompositionError

if TYPE_CHECKING:
    from verl_plugins.composition.look.model import Model


def look_at_teacher(config: DictConfig, student: Model | None, made: Mapping[str, Path]) -> list[str]:
    """One line for each teacher; none without distillation.

    `made` is where models that the preset makes can be looked at, by key.

    Raises:
        CompositionError: no model is named, it cannot be read, or its tokens are others.
    """
    lines = []
    for name, section in teacher.models(config) if teacher.is_on(config) else ():
        key, path = f"{name}.model_path", section.model_path
        if not path:
            raise CompositionError(f"{key} has no value: set it to the teacher's model, or distillation.enabled=False")
        if student is not None and "://" not in path:
            _check_tokens(key, path, made.get(key) or _folder(key, path), student)
        lines.append(f"teacher: {path}")
    return lines


def _folder(key: str, path: str) -> Path:
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.exists() or not is_name(path):
        raise CompositionError(
            f"{key}: there is no folder {path}; set {key}=… to the folder of a model, or to a name on "
            "the Hugging Face Hub"
        )
    return snapshot(path, key)


def _check_tokens(key: str, path: str, folder: Path, student: Model) -> None:
    """A teacher speaks of tokens by number, so each number must be the same token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise CompositionError(
            f"{key}: {path} has no tokenizer that transformers can read ({short(error)}); set {key}=… to a complete "
            "model"
        ) from error
    if tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise CompositionError(
            f"{key}: {path} has other tokens ({len(tokenizer)}) than {student.path} ({len(student.tokenizer)}), and a "
            f"teacher speaks of tokens by number: set {key}=… to a model with the student's tokenizer"
        )
