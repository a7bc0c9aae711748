"""The run folder: one run in it at a time, and lines that count exactly once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from verl_plugins.bridge.folder import locked, mend_lines, trouble
from verl_plugins.bridge.report import Reporter
from verl_plugins.errors import RunError

HOLDER = """
import os, sys, time
from pathlib import Path
from verl_plugins.bridge.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    if os.fork() == 0:
        time.sleep(20)
    time.sleep(60)
"""


def holder(out: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_run_is_refused_while_the_first_lives_and_not_after_it_was_killed(tmp_path, sentence) -> None:
    out = tmp_path / "mit Leerzeichen und Ümläuten"
    first = holder(out)
    with pytest.raises(RunError) as error, locked(out):
        pass
    sentence(error.value, str(out), f"pid {first.pid}", "--out")
    first.kill()  # its child lives on and does not hold the lock
    first.wait()
    with locked(out):
        assert [path.name for path in out.iterdir()] == [".lock"]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(first.pid, signal.SIGKILL)


@pytest.mark.parametrize("place", ["file/run", "/proc/run", "/dev/null/run"])
def test_a_folder_that_cannot_be_made(tmp_path, sentence, place) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError) as error, locked(tmp_path / place):
        pass
    sentence(error.value, place.split("/")[-1], "--out")


AS_SOMEONE = """
import os, sys
from pathlib import Path
from verl_plugins.bridge.folder import locked, trouble
from verl_plugins.errors import RunError
os.setuid(12345)
out = Path(sys.argv[1])
print(trouble(out))
try:
    with locked(out):
        pass
except RunError as error:
    print(error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("mode", [0o755, 0o555, 0o700])
def test_another_users_folder_and_one_that_became_read_only(sentence, mode) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        os.chmod(place, 0o755)
        out = Path(place) / "run"
        out.mkdir(mode=mode)
        done = subprocess.run([sys.executable, "-c", AS_SOMEONE, str(out)], capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert len(said) == 2, done.stderr
    sentence(said[0], str(out), "can no longer be written")
    sentence(said[1], str(out), "--out", "Permission denied")


def record(step: int, **more: object) -> bytes:
    return json.dumps({"step": step, **more}).encode() + b"\n"


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        record(3),
        record(3)[:5],
        record(2)[:-1],
        b"\x00" * 50,
        b"null\n",
        b"[]\n",
        b'{"step": "x"}\n',
        record(3) + record(4) + b'{"step": 5, "a": ',
        b"[" * 100_000 + b"\n",
    ],
)
def test_what_counts_is_kept_and_nothing_is_lost(tmp_path, tail) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = record(0, validation={}) + record(1) + record(2)
    path.write_bytes(kept + tail)
    mend_lines(path, 2)
    assert path.read_bytes() == kept
    replaced = tmp_path / "metrics.replaced.jsonl"
    assert (replaced.read_bytes().strip(b"\n") if tail else b"") == tail.strip(b"\n")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl"] + ["metrics.replaced.jsonl"] * bool(
        tail
    )


def test_a_run_that_starts_anew_counts_nothing_of_the_one_before(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(record(0, validation={}) + record(1))
    reporter = Reporter(lambda *_, **__: None, tmp_path, 0.0)
    reporter.begin(0)
    reporter.step(1, 2, {"timing_s/step": 1.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]
    assert len((tmp_path / "metrics.replaced.jsonl").read_text().splitlines()) == 2


def test_a_clock_that_is_set_back_does_not_turn_the_seconds_around(tmp_path, monkeypatch) -> None:
    reporter = Reporter(lambda *_, **__: None, tmp_path, time.monotonic())
    reporter.begin(0)
    for step, seconds in ((1, 0), (2, -7200)):
        now = time.time() + seconds
        monkeypatch.setattr(time, "time", lambda now=now: now)
        reporter.step(step, 2, {"timing_s/step": 1.0})
    since = [json.loads(line)["seconds_since_start"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= since[0] <= since[1] < 60


def test_the_line_of_a_step_shows_reward_and_accuracy_over_the_same_rows(tmp_path) -> None:
    said = []
    reporter = Reporter(lambda text, **_: said.append(text), tmp_path, 0.0)
    reporter.begin(0)
    metrics = {"critic/score/mean": 0.312, "health/reward": 0.292, "health/accuracy": 0.292}
    reporter.step(1, 2, {"timing_s/step": 1.0, **metrics})
    assert "reward 0.292  accuracy 0.292" in said[0]


@pytest.mark.parametrize("fault", ["deleted", "moved", "another file", "full disk"])
def test_a_line_that_cannot_be_written_stops_the_run(tmp_path, sentence, fault) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    reporter = Reporter(lambda *_, **__: None, folder, 0.0)
    reporter.begin(0)
    if fault == "deleted":
        (folder / "metrics.jsonl").unlink()
        folder.rmdir()
    elif fault == "moved":
        folder.rename(tmp_path / "elsewhere")
    elif fault == "another file":
        (folder / "metrics.jsonl").unlink()
        (folder / "metrics.jsonl").touch()
    else:
        os.dup2(os.open("/dev/full", os.O_WRONLY), reporter._file.fileno())
        (folder / "metrics.jsonl").unlink()
        os.symlink("/dev/full", folder / "metrics.jsonl")
    with pytest.raises(RunError) as error:
        reporter.step(1, 2, {"timing_s/step": 1.0})
    sentence(error.value, "metrics.jsonl")


def test_what_is_wrong_with_a_folder(tmp_path, sentence) -> None:
    assert trouble(tmp_path) is None
    sentence(trouble(tmp_path, tmp_path / "gone"), "gone", "deleted")


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a small file system")
def test_a_full_disk(tmp_path, sentence) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount")
    try:
        assert trouble(tmp_path) is None
        (tmp_path / "big").write_bytes(bytes(1_500_000))
        sentence(trouble(tmp_path), "full", str(tmp_path))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_terminal_is_shown_escapes_and_never_obeys_them(tmp_path) -> None:
    script = textwrap.dedent(r"""
        import sys
        from pathlib import Path
        from verl_plugins.bridge.report import Terminal
        with Terminal(Path(sys.argv[1]), verbose=True) as terminal:
            terminal.say("[red]\xfc\x1b[2J\u202e evil")
            print("\x1b]0;title\x07 from the model\x9b2J", flush=True)
    """)
    env = {**os.environ, "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "log")], capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    assert b"[red]" in done.stdout and b"\\x1b[2J" in done.stdout and b"from the model" in done.stdout
    assert not [byte for byte in done.stdout if byte < 32 and byte not in b"\n\t\r"]
    assert b"\x1b]0;title" in (tmp_path / "log").read_bytes()
