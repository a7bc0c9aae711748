"""The program of a `Pool`, whose workers look at answers. It is started by path, in an interpreter of its own.

What the workers do is said by name (`module:function`, as `judging.py` has it for mathematics): the server calls it
once, for the imports that the work takes and the function that answers requests, and forks workers on demand, so a
killed worker is replaced within milliseconds. A worker reads model output, and sympy and latex2sympy evaluate text in
places (`sympy.Number`, `nsimplify`): so it may read Python modules and nothing else, and evaluates arithmetic only.

Control socket: `fork <n>` with the socket worker n shall serve; `kill <n>`; `end <n>`, answered by the wait status when
it has ended. Worker sockets: JSON with its length in front; the first message says that the worker is ready.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import logging
import os
import re
import resource
import select
import signal
import socket
import struct
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

Answer = Callable[[dict[str, Any]], dict[str, Any]]
"""The reply to a request."""
PR_SET_PDEATHSIG = 1
LENGTH = struct.Struct("!Q")

HARMLESS = {"compile", "exec", "import", "marshal.loads", "os.listdir", "open", "array.__new__", "builtins.id"}
HARMLESS |= {"object.__getattr__", "object.__setattr__", "sys._getframe", "sys._getframemodulename"}
HARMLESS |= {"resource.setrlimit", "sys.excepthook", "sys.unraisablehook"}
"""Audit events that scoring raises; `compile` and `open` are looked at more closely."""

QUOTED = re.compile(r"'[\w.+-]*'|\"[\w.+-]*\"")
NAME = re.compile(r"(\.\s*)?\b([^\W\d]\w*)")
ARITHMETIC = re.compile(
    r"Integer|Float|Rational|Symbol|Function|E|I|e|pi|oo|sqrt|exp|log"  # numbers as sympy and mpmath write them
    r"|a?(?:sin|cos|tan)h?|ln|Abs|[A-MPRT-Za-z]"  # names in an answer; S, N, O and Q are functions of sympy
    r"|def|return|if|else|and|or|not|None|[abcr]\d+|monomial_\w+"  # functions on monomials that sympy generates
)
LITERAL = re.compile(r"[\d\s.,:+\-eE()\[\]{}]*")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def send(connection: socket.socket, message: Any) -> None:
    """One JSON message."""
    body = json.dumps(message).encode()
    connection.sendall(LENGTH.pack(len(body)) + body)


def receive(connection: socket.socket) -> Any:
    """One JSON message; EOFError when the other side is gone."""
    (length,) = LENGTH.unpack(_exactly(connection, LENGTH.size))
    return json.loads(_exactly(connection, length))


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise EOFError("the other side of the socket is closed")
        data += piece
    return data


# The server and its workers


def main() -> None:
    """Arguments: the control socket's number, and the settings as JSON (`path`, `work` and what `work()` takes)."""
    parent = os.getppid()
    control, settings = socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2])
    sys.path[:] = settings.pop("path")
    logging.disable()
    module, _, function = settings.pop("work").partition(":")
    answer = getattr(importlib.import_module(module), function)()
    warnings.simplefilter("ignore")  # only now: sympy sets filters of its own
    gc.collect()
    gc.freeze()  # keeps memory shared with the workers
    children: dict[int, int] = {}
    killed: set[int] = set()
    while os.getppid() == parent:
        if select.select([control], [], [], 1.0)[0] and not _serve(control, children, killed, answer, settings):
            break
        killed -= {pid for pid in killed if os.waitpid(pid, os.WNOHANG)[0]}
    for pid in killed | set(children.values()):
        _end(pid)


def _serve(
    control: socket.socket, children: dict[int, int], killed: set[int], answer: Answer, settings: dict[str, Any]
) -> bool:
    """Carry out one command; False when the pool is gone. Pids are not reused: only this process reaps them."""
    message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
    if not message:
        return False
    command, number = message.decode().split()
    if command == "fork":
        connection = socket.socket(fileno=descriptors[0])
        server = os.getpid()
        children[int(number)] = pid = os.fork()
        if pid == 0:
            _become_worker(connection, control, server, answer, settings)
        connection.close()
    elif command == "kill":
        os.kill(children[int(number)], signal.SIGKILL)
        killed.add(children.pop(int(number)))  # on a busy machine it may take a while to end
    else:
        control.send(b"%d" % _end(children.pop(int(number))))
    return True


def _end(pid: int) -> int:
    """Kill a child, which may have ended already, and wait for it; its wait status."""
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def _become_worker(
    connection: socket.socket, control: socket.socket, server: int, answer: Answer, settings: dict[str, Any]
) -> None:
    """Never returns."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == server:
            control.close()
            work(connection, answer, **settings)
    except (ConnectionError, EOFError):
        os._exit(0)  # the pool has let go of this worker
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(1)


def work(connection: socket.socket, answer: Answer, memory: int, seconds: float, readable: Sequence[str]) -> None:
    """Answer requests until the pool closes the connection.

    Args:
        answer: makes the reply to a request; its part `what` begins with MemoryError where memory ran out.
        memory: the most address space, in bytes.
        seconds: the most CPU time per request: a worker that nobody kills ends by itself.
        readable: folders whose files may be read.
    """
    send(connection, {"pid": os.getpid(), "modules": sorted(sys.modules)})
    confine(memory, readable)
    while True:
        request = receive(connection)
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + seconds) + 2, soft=True)
        reply = answer(request)
        send(connection, reply)
        if reply.get("what", "").startswith("MemoryError"):
            return  # what filled the memory may still be held


def confine(memory: int, readable: Sequence[str] = ()) -> None:
    """Take from this process, for good, what comparing does not need: files, processes, the network, much memory."""
    sys.dont_write_bytecode = True
    _limit(resource.RLIMIT_AS, memory)
    for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NPROC):
        _limit(kind, 0)
    folders = tuple(os.path.join(folder, "") for folder in sys.path)
    data = tuple(os.path.join(os.path.realpath(folder), "") for folder in readable)

    def is_module(file: Any) -> bool:
        name = os.fsdecode(file) if isinstance(file, (str, bytes)) else ""
        return name.startswith(folders) and name.endswith((".py", ".pyc"))

    def is_data(file: Any) -> bool:
        return isinstance(file, (str, bytes)) and bool(data) and os.path.realpath(os.fsdecode(file)).startswith(data)

    def refuse(event: str, args: tuple) -> None:
        if event == "open":
            allowed = (is_module(args[0]) or is_data(args[0])) and not args[2] & WRITING
        elif event == "compile" and isinstance(args[0], (str, bytes)):
            allowed = is_module(args[1]) or is_arithmetic(args[0]) or is_literal(args[0])
        else:
            allowed = event in HARMLESS
        if not allowed:
            raise PermissionError(f"a verifier may not do this: {event} {str(args)[:100]}")

    sys.addaudithook(refuse)


def is_arithmetic(source: str | bytes) -> bool:
    """Whether Python source is made of numbers, operators and harmless names: what sympy evaluates for an answer."""
    text = source.decode() if isinstance(source, bytes) else source
    if text == "from sympy import *":  # the names `parse_expr` knows
        return True
    text = QUOTED.sub("", text)
    names = NAME.findall(text)
    return not set(text) & set("'\"`@;[]{}\\") and all(not dot and ARITHMETIC.fullmatch(name) for dot, name in names)


def is_literal(source: str | bytes) -> bool:
    """Whether Python source is a number, a quoted word, or a list, tuple, set or dict of them."""
    text = source.decode() if isinstance(source, bytes) else source
    return LITERAL.fullmatch(re.sub(r"True|False|None", "", QUOTED.sub("", text))) is not None


def _limit(kind: int, value: int, soft: bool = False) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, hard if soft else value))


if __name__ == "__main__":
    main()
