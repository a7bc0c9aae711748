"""Where what was read of data is kept: in the user's cache, in ours, or one sentence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from verl_plugins.composition.cache import CACHE_VARIABLE, find_room_for_datasets
from verl_plugins.errors import RunError

NAMES = ("HF_DATASETS_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path: Path) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # put back afterwards, also where the code sets it
        monkeypatch.delenv(name)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "ours"))


def test_a_home_that_can_be_written_is_used(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    find_room_for_datasets()
    assert "HF_DATASETS_CACHE" not in os.environ
    assert (tmp_path / ".cache/huggingface/datasets").is_dir()


@pytest.mark.parametrize("home", ["/proc/nobody", "/dev/null", "/proc/1/task"])
def test_with_a_home_that_cannot_be_written_it_is_in_our_cache(monkeypatch, tmp_path: Path, home: str) -> None:
    monkeypatch.setenv("HOME", home)
    find_room_for_datasets()
    assert os.environ["HF_DATASETS_CACHE"] == str(tmp_path / "ours" / "datasets")


@pytest.mark.parametrize("name", ["HF_DATASETS_CACHE", "HF_HOME"])
def test_what_the_user_has_named_is_used_or_refused(monkeypatch, tmp_path: Path, sentence, name: str) -> None:
    monkeypatch.setenv("HOME", "/proc/nobody")
    monkeypatch.setenv(name, str(tmp_path / "named"))
    find_room_for_datasets()
    assert os.environ[name] == str(tmp_path / "named") and sum(other in os.environ for other in NAMES) == 1
    monkeypatch.setenv(name, "/proc/nobody/x")
    with pytest.raises(RunError) as error:
        find_room_for_datasets()
    sentence(error.value, f"{name}=/proc/nobody/x cannot be written")
