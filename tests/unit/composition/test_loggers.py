"""verl's loggers: refused before the start if they cannot start, named after the run, and inside its folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from verl_plugins.composition.loggers import PACKAGES, check_loggers, name_run, places
from verl_plugins.errors import CompositionError

DEFAULTS = {"project_name": "verl_examples", "experiment_name": "gsm8k"}


def config(logger, **trainer):
    return OmegaConf.create({"trainer": {**DEFAULTS, "logger": logger, **trainer}})


@pytest.mark.parametrize("name", PACKAGES)
def test_every_logger_is_one_of_verl_s(name: str) -> None:
    from verl.utils.tracking import Tracking

    assert name in Tracking.supported_backend


@pytest.mark.parametrize("logger", [["tensorbord"], "tensorbord", ["console", "tensorbord"]])
def test_a_logger_that_does_not_exist(logger, sentence) -> None:
    with pytest.raises(CompositionError) as error:
        check_loggers(config(logger))
    sentence(error.value, "trainer.logger", "'tensorbord'", "did you mean 'tensorboard'")


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "swanlab", "trackio"])
def test_a_logger_that_is_not_installed(name: str, sentence, monkeypatch) -> None:
    monkeypatch.setattr("verl_plugins.composition.loggers.find_spec", lambda module: None)
    with pytest.raises(CompositionError) as error:
        check_loggers(config(["console", name]))
    sentence(error.value, "trainer.logger", repr(name), f"pip install {PACKAGES[name]}")


@pytest.mark.parametrize("logger", ["console", ["console"], [], None])
def test_what_needs_nothing_is_accepted(logger) -> None:
    check_loggers(config(logger))


@pytest.mark.parametrize(
    ("overrides", "trainer", "expected"),
    [
        ([], {}, ("verl-plugins", "run-7")),
        (["trainer.experiment_name=mine"], {"experiment_name": "mine"}, ("verl-plugins", "mine")),
        (["trainer.experiment_name=gsm8k"], {}, ("verl-plugins", "gsm8k")),
        (["++trainer.project_name=verl_examples"], {}, ("verl_examples", "run-7")),
        ([], {"project_name": "of_the_recipe"}, ("of_the_recipe", "run-7")),
    ],
)
def test_a_run_has_its_folder_s_name_unless_it_was_given_one(overrides, trainer, expected) -> None:
    mine = config(["console"], **trainer)
    composed = SimpleNamespace(overrides=overrides, defaults=config(["console"]))
    name_run(mine, composed, Path("/somewhere/run-7"))
    assert (mine.trainer.project_name, mine.trainer.experiment_name) == expected


@pytest.mark.parametrize(
    ("logger", "variable"),
    [
        ("tensorboard", "TENSORBOARD_DIR"),
        ("wandb", "WANDB_DIR"),
        ("swanlab", "SWANLAB_LOG_DIR"),
        ("mlflow", "MLFLOW_TRACKING_URI"),
        ("file", "VERL_FILE_LOGGER_PATH"),
    ],
)
def test_files_go_into_the_run_folder_unless_the_user_said_where(logger: str, variable: str, tmp_path: Path) -> None:
    assert str(tmp_path) in places(config(["console", logger]), tmp_path, {})[variable]
    assert places(config(["console", logger]), tmp_path, {variable: "mine"}) == {}
    assert places(config("console"), tmp_path, {}) == {}


def test_a_resumed_run_does_not_empty_verl_s_file(tmp_path: Path) -> None:
    (tmp_path / "verl_metrics.jsonl").write_text("old")
    assert places(config("file"), tmp_path, {}) == {"VERL_FILE_LOGGER_PATH": str(tmp_path / "verl_metrics_2.jsonl")}
    assert places(config("file"), tmp_path, {"VERL_FILE_LOGGER_ROOT": "mine"}) == {}


def test_tensorboard_of_verl_writes_there(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("tensorboard")
    from verl.utils.tracking import Tracking

    monkeypatch.chdir(tmp_path)
    for variable, value in places(config("tensorboard"), tmp_path / "run", {}).items():
        monkeypatch.setenv(variable, value)
    tracking = Tracking("project", "name", ["tensorboard"])
    tracking.log({"a": 1.0}, step=1)
    tracking.finish()
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    assert not (tmp_path / "tensorboard_log").exists()
