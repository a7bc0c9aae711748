"""Which deaths end a run, and what is said of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from ray.core.generated import common_pb2

from verl_plugins.bridge import watch
from verl_plugins.bridge.watch import ProcessDied, Watch, last_words

REASON = common_pb2.ActorDiedErrorContext.Reason


def cause(reason: int, message: str = "") -> common_pb2.ActorDeathCause:
    context = common_pb2.ActorDiedErrorContext(reason=reason, error_message=message)
    return common_pb2.ActorDeathCause(actor_died_error_context=context)


@pytest.fixture
def actors(monkeypatch):
    """Ray's table of dead actors, empty at first."""
    table: dict[str, dict] = {}
    monkeypatch.setattr(watch, "ray_state", SimpleNamespace(actor_table=lambda *_: dict(table)))
    monkeypatch.setattr(
        watch, "ray", SimpleNamespace(get_runtime_context=lambda: SimpleNamespace(get_job_id=lambda: "01"))
    )
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(watch, "GRACE_SECONDS", 0.5)
    return table


@pytest.fixture
def process():
    with subprocess.Popen(["sleep", "60"]) as running:
        yield running
        running.kill()


def blocked(how: str) -> None:
    if how == "lock":
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    elif how == "sleep":
        time.sleep(60)
    elif how == "event":
        threading.Event().wait()
    else:
        os.read(os.pipe()[0], 1)


@contextmanager
def watched(node: dict[int, str], log: Path, give_up: Callable[[str], None] | None = None) -> Iterator[None]:
    over = threading.Event()
    try:
        with Watch(node, log, over, give_up or never):
            yield
    finally:
        over.set()


def never(text: str) -> None:
    raise AssertionError(text)


MINE = {"JobID": "01", "ActorClassName": "Mine", "Pid": 77, "DeathCause": cause(REASON.WORKER_DIED)}


@pytest.mark.parametrize("how", ["lock", "sleep", "event", "pipe"])
def test_a_dead_process_wakes_a_driver_that_waits(actors, tmp_path, sentence, how) -> None:
    threading.Timer(0.2, actors.update, kwargs={"a": MINE}).start()
    started = time.monotonic()
    with pytest.raises(ProcessDied) as error, watched({}, tmp_path):
        blocked(how)
    assert time.monotonic() - started < 10
    sentence(error.value, "the Mine (pid 77) died")


def test_a_dead_process_of_the_node_ends_the_driver_at_once(actors, process, tmp_path, sentence) -> None:
    said: list[str] = []
    process.kill()
    with watched({process.pid: "Ray's raylet"}, tmp_path, said.append):
        time.sleep(0.5)
    assert len(said) == 1
    sentence(said[0], f"Ray's raylet (pid {process.pid}) died")


def test_of_several_that_are_dead_the_one_that_took_the_others_along_is_named(actors, process, tmp_path) -> None:
    """The head process stands before what it has started."""
    said: list[str] = []
    process.kill()
    process.wait()
    with watched({process.pid: "Ray's head process", 999_999_999: "Ray's raylet"}, tmp_path, said.append):
        time.sleep(0.5)
    assert len(said) == 1 and said[0].startswith("Ray's head process")


def test_deaths_while_everything_is_being_ended_are_no_news(actors, process, tmp_path) -> None:
    over = threading.Event()
    with Watch({process.pid: "Ray's raylet"}, tmp_path, over, never):
        over.set()
        process.kill()
        time.sleep(0.5)


@pytest.mark.parametrize("inside", ["", "create_colocated_worker_cls.<locals>."])
@pytest.mark.parametrize("name", watch.KINDS)
def test_a_dead_actor_is_named_with_its_last_words(actors, tmp_path, sentence, name, inside) -> None:
    log = tmp_path / "verl.log"
    log.write_text(f"\x1b[36m({name} pid=77)\x1b[0m out of paper\n(Other pid=78) no\n(Raylet) 77\n")
    actors["a"] = {"JobID": "01", "ActorClassName": inside + name, "Pid": 77, "DeathCause": cause(REASON.WORKER_DIED)}
    with pytest.raises(ProcessDied) as error, watched({}, log):
        time.sleep(60)
    sentence(error.value, f"the {watch.KINDS[name]} (pid 77) died", "'out of paper'")


def test_an_error_that_a_death_caused_gives_way_to_it(actors, tmp_path) -> None:
    actors["a"] = {"JobID": "01", "ActorClassName": "Mine", "Pid": 77, "DeathCause": cause(REASON.NODE_DIED)}
    with pytest.raises(ProcessDied, match="the Mine .pid 77. died"), watched({}, tmp_path):
        raise ConnectionError("End of file")


@pytest.mark.parametrize(
    "actor",
    [
        {"JobID": "01", "DeathCause": cause(REASON.RAY_KILL)},
        {"JobID": "01", "DeathCause": cause(REASON.OUT_OF_SCOPE)},
        {"JobID": "01", "DeathCause": cause(REASON.REF_DELETED)},
        {"JobID": "01", "DeathCause": cause(REASON.WORKER_DIED, "Worker exit type: INTENDED_USER_EXIT")},
        {"JobID": "02", "DeathCause": cause(REASON.WORKER_DIED)},
    ],
)
def test_what_is_ended_on_purpose_or_belongs_to_others_ends_nothing(actors, tmp_path, actor) -> None:
    actors["a"] = {"ActorClassName": "Mine", "Pid": 77, **actor}
    with watched({}, tmp_path):
        time.sleep(0.4)
    with pytest.raises(ValueError, match="its own"), watched({}, tmp_path):
        raise ValueError("its own")


def test_a_stopped_process_is_not_dead(actors, process, tmp_path) -> None:
    process.send_signal(signal.SIGSTOP)
    with watched({process.pid: "Ray's raylet"}, tmp_path):
        time.sleep(0.5)


def test_a_driver_that_does_not_wake_is_ended(actors, tmp_path) -> None:
    said: list[str] = []
    actors["a"] = MINE
    with pytest.raises(ProcessDied), watched({}, tmp_path, said.append):
        try:
            time.sleep(60)
        finally:
            time.sleep(1)  # an end in order that takes too long
    assert len(said) == 1 and "Mine" in said[0]


@pytest.mark.parametrize("text", ["", "(A pid=7)\n", "(A pid=77) \n(A pid=7 other\n", "\x00\xff"])
def test_no_last_words(tmp_path: Path, text) -> None:
    (tmp_path / "log").write_text(text)
    assert last_words(tmp_path / "log", 7) == last_words(tmp_path / "gone", 7) == ""


def test_the_last_words_of_an_actor_with_a_name(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(
        "(Server pid=7, ip=10.0.0.1) one\n(Server pid=7, ip=10.0.0.1) two " + "x" * 500 + "\n"
    )
    assert last_words(tmp_path / "log", 7) == "x" * 200


END = """
import os, signal, sys, time
from pathlib import Path
from verl_plugins.bridge.ending import Interrupted, Signals
numbers, saves = [getattr(signal, name) for name in sys.argv[1].split()], sys.argv[2] == "saves"
with Signals(print) as signals:
    signals.saves = saves
    try:
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        print("goes on", signals.asked)
    except Interrupted as stop:
        print("stopped", stop.code)
        for number in numbers[1:]:
            os.kill(os.getpid(), number)
            time.sleep(0.1)
"""


NOW = """
import subprocess, sys, time
from pathlib import Path
from verl_plugins.bridge.ending import Signals
from verl_plugins.composition.scratch import scratch
node = subprocess.Popen(["bash", "-c", "sleep 61 & wait"], start_new_session=True)
time.sleep(0.3)
node.kill()
subprocess.Popen(["sleep", "62"])
with Signals(print) as signals, scratch() as folder:
    signals.scratch, signals.node = folder, node.pid
    print(folder, flush=True)
    signals.end_now(7)
"""


def test_ended_at_once_nothing_is_left_even_of_a_node_whose_head_is_dead() -> None:
    done = subprocess.run([sys.executable, "-c", NOW], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 7 and not Path(done.stdout.strip()).exists()
    words = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not {"sleep 61", "sleep 62"} & {*words}


@pytest.mark.parametrize(
    ("numbers", "saves", "said", "code"),
    [
        ("SIGINT", "saves", "stopped 130", 0),
        ("SIGINT SIGINT", "saves", "ended without waiting", 130),
        ("SIGTERM", "saves", "goes on 15", 0),
        ("SIGTERM SIGTERM", "saves", "ended without waiting", 143),
        ("SIGTERM", "", "stopped 143", 0),
        ("SIGHUP", "", "stopped 129", 0),
        ("SIGHUP", "saves", "goes on 1", 0),
        ("SIGTERM SIGINT", "saves", "ended without waiting", 130),
    ],
)
def test_signals(numbers, saves, said, code) -> None:
    done = subprocess.run(
        [sys.executable, "-u", "-c", END, numbers, saves],
        capture_output=True,
        text=True,
        restore_signals=True,
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGHUP)],
    )
    assert done.returncode == code, done.stderr
    assert said in done.stdout


def test_an_ignored_signal_stays_ignored() -> None:
    done = subprocess.run(
        [sys.executable, "-u", "-c", END, "SIGHUP SIGINT", ""],
        capture_output=True,
        text=True,
        preexec_fn=lambda: [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGHUP)],
    )
    assert done.stdout == "goes on None\n"
