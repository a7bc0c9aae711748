"""The pool of killable processes, and the program that compares answers in them."""

import json
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from verl_plugins.errors import PluginError
from verl_plugins.reward import verifier
from verl_plugins.reward.comparer import WORK
from verl_plugins.reward.pool import DeadlinePassed, Pool, WorkerDied, _Server

PROGRAM = Path(verifier.__file__)
HANG = {"answer": r"\prod_{k=1}^{10000000000}(1+\frac{1}{k})", "truth": "3"}
GOOD = {"answer": "0.5", "truth": r"\frac{1}{2}"}
RIGHT = "equal value"
MEMORY = 1 << 30


def servers():
    """The server processes of this process."""
    return [child for child in psutil.Process().children() if str(PROGRAM) in child.cmdline()]


def has_ended(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def gone(processes, seconds=10.0):
    """Whether all of them end within some seconds."""
    end = time.monotonic() + seconds
    while not all(has_ended(process) for process in processes):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def workers_of(server, count):
    """The server's workers; on a busy machine killed ones take a while to end."""
    end = time.monotonic() + 5
    while len(workers := {child for child in server.children() if not has_ended(child)}) > count:
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    return workers


class Started(NamedTuple):
    pool: Pool
    server: psutil.Process


@contextmanager
def started(workers, deadline):
    """A pool that has answered, and its server process."""
    known = servers()
    pool = Pool(WORK, workers, deadline, MEMORY)
    assert pool.ask(GOOD)["reason"] == RIGHT
    (server,) = [server for server in servers() if server not in known]
    yield Started(pool, server)
    pool.close()


@pytest.fixture(scope="module")
def quick():
    """Three workers, deadline 0.3 s."""
    with started(3, 0.3) as found:
        yield found


@pytest.fixture
def patient():
    """One worker, deadline 30 s."""
    with started(1, 30.0) as found:
        yield found


class TestPool:
    def test_nothing_starts_before_the_first_request(self):
        known = servers()
        pool = Pool(WORK, 2, 1.0, MEMORY)
        assert servers() == known
        pool.close()

    def test_workers_import_sympy_and_nothing_heavy(self):
        server = _Server(WORK, 1.0, MEMORY)
        modules = set(verifier.receive(server.fork().connection)["modules"])
        server.stop()
        assert {"sympy", "latex2sympy2_extended", "verl_plugins.reward.compare"} <= modules
        assert (
            not {"torch", "verl", "verl_plugins.batch", "verl_plugins.bridge", "pandas", "numpy", "ray", "transformers"}
            & modules
        )

    def test_processes_do_not_see_the_variables_of_their_owner(self, quick):
        for process in (quick.server, *quick.server.children()):
            assert set(process.environ()) <= {"PYTHONHASHSEED", "PYTHONSAFEPATH", "LD_LIBRARY_PATH", "PYTHONHOME"}

    def test_a_hung_worker_is_killed_and_the_next_answer_comes_at_once(self, quick):
        before = quick.server.children()
        start = time.monotonic()
        with pytest.raises(DeadlinePassed):
            quick.pool.ask(HANG)
        assert time.monotonic() - start < 0.3 + 0.5
        start = time.monotonic()
        assert quick.pool.ask(GOOD)["reason"] == RIGHT
        assert time.monotonic() - start < 1
        assert len(set(before) & workers_of(quick.server, 3)) == 2

    def test_all_workers_are_there_after_64_hangs_in_a_row(self, quick):
        def hang(number):
            with pytest.raises(DeadlinePassed):
                quick.pool.ask({**HANG, "truth": str(number)})

        with ThreadPoolExecutor(3) as threads:
            list(threads.map(hang, range(64)))
        start = time.monotonic()
        assert quick.pool.ask(GOOD)["reason"] == RIGHT
        assert time.monotonic() - start < 1
        assert len(workers_of(quick.server, 3)) == 3

    def test_threads_get_their_own_replies(self, quick):
        def ask(number):
            return quick.pool.ask({"answer": f"{number}.0", "truth": str(number + (number % 3 == 0))})

        with ThreadPoolExecutor(16) as threads:
            replies = list(threads.map(ask, range(96)))
        assert [reply["reason"] == RIGHT for reply in replies] == [number % 3 != 0 for number in range(96)]

    def test_a_worker_killed_while_idle_costs_no_answer(self, quick):
        workers = quick.server.children()
        for worker in workers:
            worker.kill()
        assert gone(workers)
        with ThreadPoolExecutor(3) as threads:
            assert all(reply["reason"] == RIGHT for reply in threads.map(quick.pool.ask, [GOOD] * 12))

    @pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGXCPU])
    def test_a_worker_that_crashes_is_replaced(self, patient, number):
        (worker,) = patient.server.children()
        threading.Timer(0.2, worker.send_signal, [number]).start()
        with pytest.raises(WorkerDied, match=number.name):
            patient.pool.ask(HANG)
        assert patient.pool.ask(GOOD)["reason"] == RIGHT

    def test_a_dead_server_is_replaced_with_its_workers(self, patient):
        threading.Timer(0.2, patient.server.kill).start()
        (worker,) = patient.server.children()
        with pytest.raises(WorkerDied):
            patient.pool.ask(HANG)
        assert gone([worker])
        assert patient.pool.ask(GOOD)["reason"] == RIGHT

    def test_close_ends_all_processes(self, patient):
        processes = [patient.server, *patient.server.children()]
        patient.pool.close()
        assert gone(processes)
        with pytest.raises(PluginError, match="closed"):
            patient.pool.ask(GOOD)

    def test_a_forgotten_pool_ends_its_processes(self):
        known = servers()
        pool = Pool(WORK, 1, 1.0, MEMORY)
        pool.ask(GOOD)
        processes = [process for server in servers() if server not in known for process in (server, *server.children())]
        assert len(processes) == 2
        del pool
        assert gone(processes)

    @pytest.mark.parametrize("end", ["kill -9", "exit"])
    def test_processes_end_with_their_owner_even_while_hung(self, end):
        code = f"""
            import threading, time
            from verl_plugins.reward.pool import Pool
            pool = Pool({WORK!r}, 2, 60, {MEMORY})
            pool.ask({GOOD!r})
            threading.Thread(target=pool.ask, args=[{HANG!r}], daemon=True).start()
            time.sleep(0.3)
            print("hanging", flush=True)
            time.sleep(0.5 if {end!r} == "exit" else 60)
        """
        owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
        assert owner.stdout.readline() == b"hanging\n"
        seen = psutil.Process(owner.pid).children(recursive=True)
        assert len(seen) == 3
        if end == "kill -9":
            owner.kill()
        owner.wait(20)
        assert gone(seen)

    @pytest.mark.parametrize("work", ["does_not_exist:load", "verl_plugins.reward.judging:lode", "json:loads"])
    def test_work_that_cannot_start_is_one_clear_error(self, work):
        pool = Pool(work, workers=2, deadline=1, memory=MEMORY)
        for _ in range(3):
            with pytest.raises(PluginError, match="ended while it started"):
                pool.ask({})
        pool.close()


ATTEMPTS = {
    "import": "__import__('os').system('touch {file}')",
    "open": "open('{file}', 'w')",
    "exec": "exec('open(\\'{file}\\', \\'w\\')')",
    "subclasses": "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen'][0]('{file}')",
    "builtins": "print.__self__.open('{file}', 'w')",
    "lambda": "(lambda: open('{file}', 'w'))()",
    "letters": "S('open')('{file}', 'w')",
    "list": "['{file}'.__class__, open('{file}', 'w')]",
}


class TestConfinement:
    """What a worker could do if a parser did evaluate an answer: nothing."""

    @pytest.fixture(scope="class")
    def confined(self, tmp_path_factory):
        """Runs attempts in a confined process: what each of them raised, by name."""
        folder = tmp_path_factory.mktemp("confined")
        code = f"""
            import importlib.util, json, os, socket, subprocess, sys, sympy
            spec = importlib.util.spec_from_file_location("verifier", {str(PROGRAM)!r})
            verifier = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(verifier)
            attempts, seen = json.load(sys.stdin), {{}}
            verifier.confine({MEMORY})
            def attempt(name, action):
                try:
                    seen[name] = "returned " + repr(action())
                except Exception as error:
                    seen[name] = type(error).__name__
            for name, source in attempts.items():
                attempt("sympify " + name, lambda: sympy.sympify(source))
                attempt("eval " + name, lambda: eval(source))
            attempt("write", lambda: os.open({str(folder / "write")!r}, os.O_CREAT | os.O_WRONLY))
            attempt("read", lambda: open("/etc/passwd").read())
            attempt("fork", os.fork)
            attempt("spawn", lambda: subprocess.run(["touch", {str(folder / "spawn")!r}]))
            attempt("network", lambda: socket.create_connection(("127.0.0.1", 9)))
            attempt("kill", lambda: os.kill(os.getppid(), 9))
            attempt("remove", lambda: os.remove({str(PROGRAM)!r}))
            attempt("memory", lambda: len(bytearray({2 * MEMORY})))
            attempt("number", lambda: str(sympy.sympify("2*3.50 + 1/4")))
            attempt("lazy import", lambda: str(__import__("sympy.physics.units").physics.units.meter))
            print(json.dumps(seen))
        """
        attempts = {name: source.format(file=folder / name) for name, source in ATTEMPTS.items()}
        command = [sys.executable, "-c", textwrap.dedent(code)]
        done = subprocess.run(command, input=json.dumps(attempts), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), list(folder.iterdir())

    @pytest.mark.parametrize("attempt", [f"{how} {name}" for name in ATTEMPTS for how in ("sympify", "eval")])
    def test_text_is_not_evaluated(self, confined, attempt):
        assert confined[0][attempt] in ("PermissionError", "SympifyError")

    @pytest.mark.parametrize("attempt", ["write", "read", "fork", "spawn", "network", "kill", "remove"])
    def test_the_system_is_out_of_reach(self, confined, attempt):
        assert confined[0][attempt] == "PermissionError"

    def test_memory_is_limited(self, confined):
        assert confined[0]["memory"] == "MemoryError"

    def test_nothing_was_written(self, confined):
        assert confined[1] == []

    def test_numbers_and_imports_still_work(self, confined):
        assert confined[0]["number"] == "returned '7.25000000000000'"
        assert confined[0]["lazy import"] == "returned 'meter'"
