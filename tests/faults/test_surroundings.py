"""Disks, folders and environments that are not as they should be."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from training import SHORT, command, train

from verl_plugins.composition.cache import cache_folder

root = pytest.mark.skipif(os.getuid() != 0, reason="mounts file systems")


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


@root
def test_a_disk_that_fills_up(start, tmp_path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], check=True)
    try:
        run = start(out=disk / "run")  # a checkpoint has some 7 MB
        run.process.wait(timeout=600)
        output = (disk / "run.terminal").read_text()
        assert run.process.returncode == 1
        assert len(errors(output)) == 1 and "full" in errors(output)[0]
    finally:
        run.end()
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_run_folder_that_is_deleted(start) -> None:
    run = start().until(1)
    shutil.rmtree(run.out, ignore_errors=True)
    shutil.rmtree(run.out, ignore_errors=True)
    assert run.ended() == 1
    assert len(errors(run.output)) == 1 and str(run.out) in errors(run.output)[0]


def test_an_odd_environment(tmp_path: Path, monkeypatch) -> None:
    """No HOME, a locale without umlauts, a temporary folder with a long path, spaces and umlauts in --out."""
    monkeypatch.setenv("VERL_PLUGINS_CACHE", str(cache_folder()))
    monkeypatch.delenv("HOME", raising=False)
    for name in ("LANG", "LC_ALL"):
        monkeypatch.setenv(name, "C")
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    out = tmp_path / "ein Ordner für Läufe"
    done = train("vade", out, *SHORT, "trainer.total_training_steps=1", "trainer.save_freq=1")
    assert (out / "global_step_1/files.json").is_file() and len(done.steps) == 1
    assert list(long.iterdir()) == []


@root
def test_no_network_but_loopback(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    words = command("vade", tmp_path / "run", *SHORT, "trainer.total_training_steps=1")
    lonely = ["unshare", "--net", "sh", "-c", 'ip link set lo up 2>/dev/null || true; exec "$@"', "sh", *words]
    done = subprocess.run(lonely, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
