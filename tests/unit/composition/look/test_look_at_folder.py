"""The run folder: nothing found there changes in silence what a command asks for, and `config.yaml` stays true."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from verl_plugins import CompositionError
from verl_plugins.composition.look.folder import MARKER, keep_config, look_at_folder

ASKED = {
    "actor_rollout_ref": {"model": {"path": "/models/a"}, "actor": {"optim": {"lr": 1e-6}}},
    "data": {"train_files": "/data/a.parquet", "seed": 1, "val_files": None},
    "plugins": {"grpo": {"epsilon": 1e-6}},
    "trainer": {"resume_mode": "auto", "resume_from_path": None, "total_training_steps": 4, "logger": ["console"]},
}


def asked(**changes: object) -> DictConfig:
    config = OmegaConf.create(ASKED)
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value, merge=False)
    return config


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has saved after step 2."""
    (tmp_path / "global_step_2").mkdir()
    (tmp_path / MARKER).write_text("2")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    keep_config(tmp_path, OmegaConf.to_yaml(asked()))
    return tmp_path


def test_the_same_command_resumes(run: Path) -> None:
    assert look_at_folder(asked(), run) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("trainer__total_training_steps", 8), ("trainer__logger", ["tensorboard"]), ("data__val_files", "b")],
)
def test_what_changes_nothing_about_the_training_is_allowed(run: Path, key: str, value: object) -> None:
    assert look_at_folder(asked(**{key: value}), run) == []


def test_other_settings_of_the_training_are_said(run: Path) -> None:
    (said,) = look_at_folder(asked(actor_rollout_ref__actor__optim__lr=1e-5), run)
    assert "actor_rollout_ref.actor.optim.lr 1e-06 -> 1e-05" in said


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("plugins", {"vade": {}}, "plugins."),
        ("plugins__grpo__epsilon", 1e-3, "plugins.grpo.epsilon"),
        ("actor_rollout_ref__model__path", "/models/b", "/models/a -> /models/b"),
        ("data__train_files", "/data/b.parquet", "data.train_files"),
        ("data__seed", 2, "data.seed 1 -> 2"),
    ],
)
def test_another_run_is_refused_and_nothing_is_written(
    run: Path, key: str, value: object, part: str, sentence: Callable[..., None]
) -> None:
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(CompositionError) as error:
        look_at_folder(asked(**{key: value}), run)
    sentence(error.value, f"--out {run} holds a run with other settings", part, "another --out")
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}


def test_metrics_without_a_checkpoint_are_not_continued_by_another_run(tmp_path: Path, sentence) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    keep_config(tmp_path, OmegaConf.to_yaml(asked()))
    with pytest.raises(CompositionError) as error:
        look_at_folder(asked(actor_rollout_ref__actor__optim__lr=1e-5), tmp_path)
    sentence(error.value, "metrics of a run without checkpoint", "optim.lr")


@pytest.mark.parametrize("content", ["", "- a list", "{broken", "!!python/object/apply:os.system ['true']"])
def test_a_configuration_that_cannot_be_read_is_named(run: Path, content: str, sentence) -> None:
    (run / "config.yaml").write_text(content)
    with pytest.raises(CompositionError) as error:
        look_at_folder(asked(), run)
    sentence(error.value, "config.yaml", "another --out")


def test_a_folder_without_a_run_is_free(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert look_at_folder(asked(), tmp_path) == []
    assert look_at_folder(asked(), tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"trainer__resume_mode": "atuo"}, ("trainer.resume_mode", "'atuo'", "auto, disable or resume_path")),
        ({"trainer__resume_mode": "resume_path"}, ("trainer.resume_from_path is not set",)),
        (
            {"trainer__resume_mode": "resume_path", "trainer__resume_from_path": "/no/global_step_3"},
            ("/no/global_step_3 is not the folder of a checkpoint",),
        ),
    ],
)
def test_where_to_resume_from_must_be_there(tmp_path: Path, changes: dict, parts: tuple[str, ...], sentence) -> None:
    with pytest.raises(CompositionError) as error:
        look_at_folder(asked(**changes), tmp_path)
    sentence(error.value, *parts)


def test_a_resumed_run_keeps_what_made_the_steps_before(run: Path) -> None:
    keep_config(run, OmegaConf.to_yaml(asked()))
    assert not list(run.glob("config-*.yaml"))
    keep_config(run, OmegaConf.to_yaml(asked(trainer__total_training_steps=8)))
    assert OmegaConf.load(run / "config-1.yaml").trainer.total_training_steps == 4
    assert OmegaConf.load(run / "config.yaml").trainer.total_training_steps == 8
