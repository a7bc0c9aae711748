"""A damaged checkpoint is named before anything starts, with the one before it."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import TensorMeta

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
            if path.suffix == ".pt":
                torch.save({name: step, "state": [torch.ones(3), np.random.RandomState(0).get_state()]}, path)
            else:
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


class Calls:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path, function: object = os.mkdir) -> None:
        self.call = function, (str(folder),)

    def __reduce__(self) -> tuple:
        return self.call


def in_protocol(number: int) -> Callable[[object, Path], None]:
    return lambda state, path: torch.save(state, path, pickle_protocol=number)


WRITERS = {
    "torch.save": torch.save,
    "another protocol": in_protocol(4),
    "the old format": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "plain pickle": lambda state, path: path.write_bytes(pickle.dumps(state)),
}


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".pt")])
def test_a_file_that_would_run_something_is_never_loaded(tmp_path, sentence, name, writer, listed) -> None:
    write(tmp_path, 1, 2)
    folder = tmp_path / "global_step_2"
    WRITERS[writer]({"weights": torch.ones(2), "more": [Calls(tmp_path / "made")]}, folder / name)
    record(folder)
    if not listed:
        (folder / FILES).unlink()
    with pytest.raises(StateError) as error:
        resumed(tmp_path)
    told = "would run posix.mkdir" if writer == "torch.save" else "is not what torch.save writes"
    sentence(error.value, name, told, f"resume_from_path={tmp_path / 'global_step_1'}")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "function",
    [eval, exec, getattr, __import__, os.system, subprocess.Popen, torch.hub.load, torch.load, SimpleNamespace],
)
def test_what_state_has_no_use_for(tmp_path, function) -> None:
    torch.save([Calls(tmp_path / "made", function)], tmp_path / "data.pt")
    assert "would run" in damage(tmp_path)


def test_state_of_every_kind_is_taken(tmp_path) -> None:
    state = {
        "random": [random.getstate(), np.random.get_state(), np.random.default_rng(0).bit_generator.state],
        "numpy": [np.float32(1), np.arange(3), np.array(["a"]), np.zeros(2, bool)],
        "torch": [torch.get_rng_state(), torch.ones(1, dtype=torch.bfloat16), torch.float16, torch.device("cpu")],
        "plain": [OrderedDict(a=1), {1, 2}, (None, True, 2**80, 1.5, "ü", b"bytes")],
        "sharded": [
            DTensor,
            Shard(0),
            Replicate(),
            TensorMeta(torch.Size([1]), (1,), torch.float32),
            ShardMetadata([0], [1]),
        ],
    }
    torch.save(state, tmp_path / "data.pt")
    assert damage(tmp_path) is None


def test_large_files_are_looked_at_too(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(WHOLE + 100)
    record(tmp_path)
    assert damage(tmp_path) is None
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert "model.safetensors" in damage(tmp_path)
