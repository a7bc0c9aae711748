"""A teacher's model before anything starts: there, readable, and with the student's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
from omegaconf import OmegaConf

from verl_plugins.composition.compose import compose
from verl_plugins.composition.look.model import Model
from verl_plugins.composition.look.teacher import look_at_teacher
from verl_plugins.cpu.model import make_tokenizer
from verl_plugins.cpu.preset import TEACHER
from verl_plugins.errors import CompositionError

ON = "distillation.enabled=true"


@pytest.fixture
def student() -> Model:
    return Model("student", None, make_tokenizer())


def look(student: Any, *overrides: str) -> list[str]:
    return look_at_teacher(compose("grpo", "cpu", overrides).config, student, {})


def test_none_without_distillation(student) -> None:
    assert look(student) == []


def test_one_that_reads_the_same_tokens(student, tmp_path) -> None:
    folder = models.write(tmp_path / "teacher")
    assert look(student, ON, f"{TEACHER}={folder}") == [f"teacher: {folder}"]


def test_none_is_named(student, sentence) -> None:
    with pytest.raises(CompositionError) as error:
        look(student, ON)
    sentence(error.value, f"{TEACHER} has no value")


def test_other_tokens(student, tmp_path, sentence) -> None:
    folder = models.write(tmp_path / "teacher")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(CompositionError) as error:
        look(student, ON, f"{TEACHER}={folder}")
    sentence(error.value, TEACHER, "other tokens (260)", "student (259)")


@pytest.mark.parametrize("there", [False, True], ids=["no folder", "an empty folder"])
def test_no_model_there(student, tmp_path, sentence, there) -> None:
    folder = tmp_path / "nothing here"
    if there:
        folder.mkdir()
    with pytest.raises(CompositionError) as error:
        look(student, ON, f"{TEACHER}='{folder}'")
    sentence(error.value, TEACHER, str(folder))


def test_several_teachers(student, tmp_path) -> None:
    config = compose("grpo", "cpu", [ON]).config
    OmegaConf.set_struct(config, False)
    single = config.distillation.teacher_models.teacher_model
    for name in ("one", "two"):
        folder: Path = models.write(tmp_path / name)
        config.distillation.teacher_models[name] = OmegaConf.merge(single, {"key": name, "model_path": str(folder)})
    assert [Path(line.split()[1]).name for line in look_at_teacher(config, student, {})] == ["one", "two"]
