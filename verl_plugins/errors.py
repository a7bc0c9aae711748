"""Every error a user of this package can meet. Each message is one sentence: what is wrong, where, what would be right.

PluginError
├── CompositionError   recipe, plugins, settings or data do not fit together; raised before any process starts
├── DataError          a batch holds what a method cannot use (NaN reward, missing field, ±1 where 0/1 is needed)
│   └── ResultError    a stage gave what training cannot go on with (another shape, NaN, an id that does not exist)
├── PluginFailed       a plugin raised an error of its own in another process
├── StateError         a checkpoint's plugin state does not belong to this run
└── RunError           a folder that is no run, or a run that lacks what is asked of it
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable


class PluginError(Exception):
    """Base of all errors this package raises on purpose."""


class CompositionError(PluginError):
    """Recipe, plugins, settings or data do not fit together."""


class DataError(PluginError):
    """A batch holds what a method cannot use."""


class ResultError(DataError):
    """A stage gave what training cannot go on with."""


class PluginFailed(PluginError):
    """A plugin raised an error of its own in another process; the message says which, where and what."""


class StateError(PluginError):
    """Saved plugin state does not belong to this run."""


class RunError(PluginError):
    """A folder is no run, or a run lacks what is asked of it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint to append to an error: `; did you mean 'vade'?`, or the list of valid names when nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def printable(text: object) -> str:
    """Text for a terminal: what could command it (escape sequences, changes of direction) is shown, not obeyed."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else ascii(c)[1:-1] for c in str(text)
    )
