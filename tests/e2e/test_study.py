"""A study through the real trainer, as a user starts it: two variants, a seed; called again it trains nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

VARIANTS = ("grpo", "grpo plugins.grpo.scale=none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


def study(folder: Path) -> subprocess.CompletedProcess:
    words = [
        "--preset",
        "cpu",
        "--seeds",
        "1",
        "--steps",
        "1",
        "--set",
        "data.train_batch_size=4",
        "--out",
        str(folder),
    ]
    words += ["--set", "actor_rollout_ref.actor.ppo_mini_batch_size=4", "--set", "data.val_max_samples=8"]
    command = [sys.executable, "-m", "verl_plugins", "study", *VARIANTS, *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_variants_are_trained_and_compared(folder: Path) -> None:
    done = study(folder)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "study.json").read_text())
    assert [one["variant"] for one in found["results"]] == list(VARIANTS)
    for one in found["results"]:
        assert [step for step, _, _ in one["curve"]] == [0, 1] and one["tokens"] > 0 and one["seconds"] > 0
        assert (folder / "runs" / one["run"] / "finished").is_file()
    assert "one seed cannot tell" in (folder / "index.html").read_text()


def test_called_again_it_trains_nothing(folder: Path) -> None:
    written = {file: file.stat().st_mtime for file in (folder / "runs").rglob("metrics.jsonl")}
    begun = time.monotonic()
    done = study(folder)
    assert done.returncode == 0 and "training" not in done.stderr
    assert len(written) == 2 and all(file.stat().st_mtime == at for file, at in written.items())
    assert time.monotonic() - begun < 60
