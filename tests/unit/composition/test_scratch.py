"""Temporary folders: one per run, gone with it, and only those of dead owners are removed by others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from verl_plugins.composition import scratch
from verl_plugins.composition.scratch import OWNER
from verl_plugins.errors import RunError

HOLDER = """
import time
from verl_plugins.composition.scratch import scratch
with scratch() as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def place(monkeypatch):
    """A temporary folder with a short path, the only one."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        monkeypatch.setattr(scratch, "_places", lambda: iter([Path(folder)]))
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)


def test_everything_temporary_is_in_it_and_goes_with_it(place) -> None:
    with scratch.scratch() as folder:
        assert folder.parent == place
        assert Path(tempfile.mkdtemp()).is_relative_to(folder)
        command = [sys.executable, "-c", "import tempfile; print(tempfile.mkdtemp())"]
        assert Path(subprocess.check_output(command, text=True).strip()).is_relative_to(folder)
        assert scratch.leftovers(place) == []
    assert list(place.iterdir()) == []
    assert tempfile.gettempdir() == str(place)


def test_what_a_killed_run_left_is_removed_by_the_next(place) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True) as run:
        folder = Path(run.stdout.readline().strip())
        assert folder.parent == place and scratch.leftovers(place) == []
        run.kill()
    (folder / "t" / "ckpt_1234.lock").touch()
    assert scratch.leftovers(place) == [folder]
    with scratch.scratch() as other:
        assert list(place.iterdir()) == [other]


def test_what_is_still_written_to_while_it_is_removed_is_removed_by_the_next(place, monkeypatch) -> None:
    folder = place / "vp_other"
    (folder / "session" / "logs").mkdir(parents=True)
    (folder / "s").touch()
    (folder / "link").symlink_to(place)
    (folder / OWNER).write_text('{"pid": 999999999, "started": 0}')
    with monkeypatch.context() as patch:
        patch.setattr(scratch.shutil, "rmtree", lambda *_, **__: None)  # finds a new file each time
        scratch.remove(folder)
    assert sorted(path.name for path in folder.iterdir()) == [OWNER, "session"]
    assert scratch.clean() == [folder] and list(place.iterdir()) == []
    scratch.remove(folder)  # is gone


@pytest.mark.parametrize("owner", [None, "", "{}", "[]", '{"pid": 1, "started": 0}', "\x00"])
def test_what_is_not_surely_a_dead_runs_stays(place, owner) -> None:
    folder = place / "vp_other"
    folder.mkdir()
    if owner is not None:
        (folder / OWNER).write_text(owner)
    if owner and "pid" in owner:  # this process id belongs to another process by now
        assert scratch.leftovers(place) == [folder]
        (folder / OWNER).write_text(json.dumps({"pid": 1, "started": psutil.Process(1).create_time()}))
    assert scratch.clean() == []
    assert folder.is_dir()


def test_another_users_folder_stays(place) -> None:
    folder = place / "vp_other"
    folder.mkdir()
    (folder / OWNER).write_text('{"pid": 999999999, "started": 0}')
    assert scratch.leftovers(place) == [folder]
    if os.getuid() == 0:
        os.chown(folder, 12345, 12345)
        assert scratch.leftovers(place) == []


def test_a_long_path_is_not_used_for_sockets(place, monkeypatch, sentence) -> None:
    long = place / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(scratch, "_places", lambda: iter([long, place]))
    with scratch.scratch() as folder:
        assert folder.parent == place
    monkeypatch.setattr(scratch, "_places", lambda: iter([long]))
    with pytest.raises(RunError) as error, scratch.scratch():
        pass
    sentence(error.value, "TMPDIR", "31 characters")
