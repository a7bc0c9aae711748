"""A damaged checkpoint is named before anything starts, with the one before it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from verl_plugins.bridge.intact import FILES, MARKER, WHOLE, damage, record, resumed_from
from verl_plugins.errors import StateError

NAMES = [
    "actor/model_world_size_1_rank_0.pt",
    "actor/optim_world_size_1_rank_0.pt",
    "actor/extra_state_world_size_1_rank_0.pt",
    "actor/huggingface/config.json",
    "data.pt",
    "plugins/state.json",
    "plugins/arrays.safetensors",
]


def write(out: Path, *steps: int) -> None:
    for step in steps:
        for name in NAMES:
            path = out / f"global_step_{step}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"{name} of {step}".encode() * 20)
        record(out / f"global_step_{step}")
        (out / MARKER).write_text(str(step))


def resumed(out: Path, mode: str = "auto", path: object = None) -> Path | None:
    trainer = {"default_local_dir": str(out), "resume_mode": mode, "resume_from_path": path and str(path)}
    return resumed_from(OmegaConf.create({"trainer": trainer}))


DAMAGES = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "garbage": lambda path: path.write_bytes(os.urandom(path.stat().st_size)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", [*NAMES, FILES])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_offered(tmp_path, sentence, name, how) -> None:
    if name == FILES and how == "gone":
        pytest.skip("a checkpoint of an earlier version")
    write(tmp_path, 1, 2, 3)
    assert resumed(tmp_path) == tmp_path / "global_step_3"
    DAMAGES[how](tmp_path / "global_step_3" / name)
    (tmp_path / "global_step_2" / "data.pt").unlink()  # is not offered
    with pytest.raises(StateError) as error:
        resumed(tmp_path)
    offered = tmp_path / "global_step_1"
    sentence(error.value, name, f"trainer.resume_mode=resume_path trainer.resume_from_path={offered}")
    assert resumed(tmp_path, "resume_path", offered) == offered
    assert resumed(tmp_path, "disable") is None


@pytest.mark.parametrize("content", ["", " \n", "x", "-1", "1.5", "٣", "3 4", "\x00\x00", "7"])
def test_a_marker_that_names_no_checkpoint(tmp_path, sentence, content) -> None:
    write(tmp_path, 1, 2)
    (tmp_path / MARKER).write_text(content)
    with pytest.raises(StateError) as error:
        resumed(tmp_path)
    sentence(error.value, MARKER, f"resume_from_path={tmp_path / 'global_step_2'}")


def test_a_marker_that_is_gone(tmp_path, sentence) -> None:
    assert resumed(tmp_path) is None
    (tmp_path / "global_step_1/actor").mkdir(parents=True)  # a kill within the first checkpoint
    assert resumed(tmp_path) is None
    write(tmp_path, 2)
    (tmp_path / MARKER).unlink()
    with pytest.raises(StateError) as error:
        resumed(tmp_path)
    sentence(error.value, MARKER, "global_step_2", "trainer.resume_mode=disable")


def test_nothing_else_is_whole(tmp_path, sentence) -> None:
    write(tmp_path, 2)
    (tmp_path / "global_step_2/data.pt").write_bytes(b"")
    with pytest.raises(StateError) as error:
        resumed(tmp_path)
    sentence(error.value, "data.pt is empty", "trainer.resume_mode=disable")


@pytest.mark.parametrize("path", [None, "", "somewhere", "global_step_", "global_step_9", "global_step_2/"])
def test_a_path_that_is_no_checkpoint(tmp_path, sentence, path) -> None:
    write(tmp_path, 2)
    with pytest.raises(StateError) as error:
        resumed(tmp_path, "resume_path", path and f"{tmp_path}/{path}")
    sentence(error.value, "trainer.resume_from_path")


def test_large_files_are_looked_at_too(tmp_path) -> None:
    path = tmp_path / "model.pt"
    with path.open("wb") as file:
        file.truncate(WHOLE + 100)
    record(tmp_path)
    assert damage(tmp_path) is None
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert "model.pt" in damage(tmp_path)
