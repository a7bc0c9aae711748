"""Whose error it is: plugin, stage, file and line on what escapes a plugin, and the sentence a user reads of it."""

from __future__ import annotations

import contextlib
import inspect
import re
from asyncio.exceptions import CancelledError
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from verl_plugins.errors import PluginError, PluginFailed

RAISED_BY = "raised by "
"""How the note on an exception begins: `raised by plugin 'vade' in observe, /…/vade.py:120`."""
NOTE = re.compile(rf"^{RAISED_BY}(?P<who>.+)$", re.MULTILINE)
MOST = 400
"""Characters of a message in the sentence; all of it is in the log."""


@contextlib.contextmanager
def blame(who: str, stage: str, implementation: Callable[..., Any]) -> Iterator[None]:
    """Note on an exception that escapes whose it is, once: wrappers around it are not to blame.

    Also on `sys.exit` and a cancellation; what interrupts the whole run passes.
    """
    try:
        yield
    except (Exception, SystemExit, CancelledError) as error:
        if _note(error) is None:
            add_note(error, f"{who} in {stage}, {_place(error.__traceback__, implementation)}")
        raise


def add_note(error: BaseException, who: str) -> None:
    """Say whose an exception is."""
    with contextlib.suppress(AttributeError, TypeError):  # some exceptions cannot be changed
        error.__notes__ = [*getattr(error, "__notes__", []), RAISED_BY + who]


def whose(error: BaseException) -> str | None:
    """Plugin, stage, file and line as noted, also on what crossed a process; None where nothing was noted."""
    for known in (getattr(error, "cause", None), error):
        if known is not None and (note := _note(known)):
            return note.removeprefix(RAISED_BY)
    found = NOTE.findall(_text(error)) if hasattr(error, "cause") else []  # a note that is only in Ray's traceback
    return found[-1] if found else None


def words(error: BaseException) -> str:
    """What an exception says, in one line, with the name of its class unless it is one of ours."""
    cause = getattr(error, "cause", None) or error
    text = _text(cause)
    if hasattr(cause, "traceback_str"):  # Ray's own: the whole traceback
        return text.splitlines()[-1].strip() if text else type(cause).__name__
    text = " ".join(text.split())
    text = text if len(text) <= MOST else f"{text[: MOST - 1]}…"
    if isinstance(cause, PluginError):
        return text
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__


def _text(error: BaseException) -> str:
    try:
        return str(error).strip()
    except Exception:  # a class that somebody wrote wrong must not hide that there was an error
        return ""


def told(error: BaseException) -> str:
    """The words, and whose they are."""
    text, who = words(error), whose(error)
    return text if who is None or f"({who})" in text else f"{text} ({who})"


def sentence(error: BaseException) -> str:
    """Why training stopped, in one line."""
    ours = isinstance(getattr(error, "cause", None) or error, PluginError)
    return told(error) if ours or whose(error) else f"training stopped ({words(error)})"


@contextlib.contextmanager
def crossing() -> Iterator[None]:
    """In a worker: a plugin's own exception leaves the process as words, since not every class can be pickled.

    Nor may a call of `sys.exit` end the worker, whoever made it.
    """
    try:
        yield
    except (Exception, SystemExit, CancelledError) as error:
        ordinary = isinstance(error, Exception)
        if isinstance(error, PluginFailed) or (ordinary and whose(error) is None):
            raise
        failed = PluginFailed if not isinstance(error, PluginError) else type(error)
        raise failed(told(error)) from error


def _note(error: BaseException) -> str | None:
    return next((note for note in getattr(error, "__notes__", []) if note.startswith(RAISED_BY)), None)


def _place(traceback: TracebackType | None, implementation: Callable[..., Any]) -> str:
    """File and line of the innermost frame in the plugin's own code, or where its implementation begins."""
    families = {_family(module) for module in _modules(implementation)}
    place = None
    while traceback is not None:
        frame = traceback.tb_frame
        if _family(frame.f_globals.get("__name__", "")) in families:
            place = f"{frame.f_code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    code = inspect.unwrap(getattr(implementation, "__func__", implementation)).__code__
    return place or f"{code.co_filename}:{code.co_firstlineno}"


def _modules(implementation: Callable[..., Any]) -> set[str]:
    """Where the plugin's code is: its class's module, those of the classes it builds on, the function's own."""
    owner = type(getattr(implementation, "__self__", None))
    bases = [cls.__module__ for cls in owner.__mro__ if cls.__module__ not in ("builtins", "verl_plugins.plugin")]
    return {*bases, implementation.__module__}


def _family(module: str) -> str:
    """A distribution's code is all of its package; of this package a method is what is in its folder."""
    first, _, rest = module.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "verl_plugins" else first
