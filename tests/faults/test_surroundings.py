"""Disks, folders, memory and environments that are not as they should be."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from training import SHORT, Training, command

from verl_plugins.bridge.intact import damage, latest_step
from verl_plugins.composition.cache import CACHE_VARIABLE, cache_folder

root = pytest.mark.skipif(os.getuid() != 0, reason="only the administrator may")
GIB = 1 << 30
SET_BACK = """
import os, time
real = time.time
time.time = lambda: real() - 7200 * os.path.exists(FLAG)
"""


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def trained(out: Path, steps: int, *before: str, **options: object) -> Training:
    """A run of some steps, started through the words `before`."""
    words = command("vade", out, *SHORT, f"trainer.total_training_steps={steps}", "trainer.save_freq=1")
    done = subprocess.run([*before, *words], capture_output=True, text=True, timeout=800, **options)
    return Training(out, done.returncode, done.stdout + done.stderr)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own, with room for three checkpoints."""
    folder = tmp_path / "run"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder]).returncode:
        pytest.skip("may not mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@root
def test_a_disk_that_fills_up(start, small_disk) -> None:
    run = start(out=small_disk)
    run.process.wait(timeout=600)
    assert run.process.returncode == 1
    assert len(errors(run.output)) == 1 and "full" in errors(run.output)[0]
    step = latest_step(small_disk)
    assert step > 0 and damage(small_disk / f"global_step_{step}") is None
    assert run.steps[:step] == list(range(1, step + 1))
    assert "go on with: verl-plugins run vade" in run.output


def test_a_run_folder_that_is_deleted(start) -> None:
    run = start().until(1)
    while run.out.exists():
        shutil.rmtree(run.out, ignore_errors=True)
    assert run.ended() == 1
    assert len(errors(run.output)) == 1 and str(run.out) in errors(run.output)[0]


def test_an_odd_environment_without_a_network(tmp_path: Path) -> None:
    """No HOME, a locale without umlauts, the first time zone, a temporary folder with a long path, an odd --out.

    Where `unshare` may, there is no network but loopback.
    """
    alone = ["unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "sh"]
    may = shutil.which("ip") and not subprocess.run([*alone, "true"], capture_output=True).returncode
    long = tmp_path / ("x" * 120)
    long.mkdir()
    odd = {"LANG": "C", "LC_ALL": "C", "TZ": "Pacific/Kiritimati", "TMPDIR": str(long)}
    kept = {name: value for name, value in os.environ.items() if name != "HOME" and not name.startswith("LC_")}
    out = tmp_path / "ein Ordner für 'Läufe' $1"
    umask = {"preexec_fn": lambda: os.umask(0o077)}
    env = {**kept, CACHE_VARIABLE: str(cache_folder()), **odd}
    done = trained(out, 1, *(alone if may else ()), env=env, **umask)
    assert done.returncode == 0, done.output
    assert (out / "global_step_1/files.json").is_file() and len(done.steps) == 1
    assert list(long.iterdir()) == []


def test_a_clock_that_is_set_back_and_a_home_that_cannot_be_written(start, tmp_path) -> None:
    """Two hours, in all Python processes of the run; Ray's own clock is not reached."""
    site, flag = tmp_path / "site", tmp_path / "set back"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SET_BACK.replace("FLAG", repr(str(flag))))
    env = {**os.environ, "PYTHONPATH": str(site), "HOME": "/proc/nobody", CACHE_VARIABLE: str(cache_folder())}
    run = start(env=env).until(1)
    flag.touch()
    run.until(4).process.send_signal(signal.SIGTERM)
    assert run.ended(180) == 143
    records = Training(run.out, 143, run.output).steps
    since = [record["seconds_since_start"] for record in records]
    assert since == sorted(since) and since[0] > 0 and all(record["seconds"] > 0 for record in records)


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A control group of the kernel with so many bytes of memory for all its processes together."""
    older, newer = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    parent, file = (older, "memory.limit_in_bytes") if older.is_dir() else (newer, "memory.max")
    group = parent / f"verl_plugins_{os.getpid()}"
    try:
        group.mkdir()
        (group / file).write_text(str(limit))
    except OSError as error:
        pytest.skip(f"no control groups ({error})")
    try:
        yield group
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


@root
def test_three_gib_of_memory(tmp_path) -> None:
    with memory_group(3 * GIB) as group:
        done = trained(tmp_path / "run", 2, preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
    assert done.returncode == 0, done.output
