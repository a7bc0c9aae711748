"""Which checkpoint a run goes on from, and whether its files are as they were written: known before anything starts.

A checkpoint has the list of its files, with sizes and hashes, in `files.json`. It is written when verl's files and ours
are complete, just before the checkpoint is marked as the latest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from verl_plugins.errors import StateError

if TYPE_CHECKING:
    from omegaconf import DictConfig

FILES = "files.json"
MARKER = "latest_checkpointed_iteration.txt"
WHOLE, EDGE = 64 << 20, 16 << 20
"""Of a file of more than WHOLE bytes, the first and the last EDGE bytes are hashed."""
ANEW = "start anew with trainer.resume_mode=disable"


def record(checkpoint: Path) -> None:
    """Write the list of a checkpoint's files."""
    found = {}
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint)
        if path.is_file() and not any(part.startswith(".") for part in name.parts) and name != Path(FILES):
            found[str(name)] = {"bytes": path.stat().st_size, "sha256": _hash(path)}
    temporary = checkpoint / f".{FILES}.{os.getpid()}"
    temporary.write_text(json.dumps(found, indent=1))
    os.replace(temporary, checkpoint / FILES)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: the first file that is not as it was written, or that is no state but a program.

    None if nothing is known to be.
    """
    return _changed(checkpoint) or _foreign(checkpoint)


def _foreign(checkpoint: Path) -> str | None:
    from verl_plugins.bridge.pickles import foreign  # imports torch, which a new run does later, beside other things

    for path in sorted(checkpoint.rglob("*.pt")):
        if wrong := foreign(path):
            return f"{path.relative_to(checkpoint)} {wrong}"
    return None


def _changed(checkpoint: Path) -> str | None:
    if not (checkpoint / FILES).exists():
        return None
    try:
        told = json.loads((checkpoint / FILES).read_bytes())
        for name, what in told.items():
            if wrong := _wrong(checkpoint / name, what["bytes"], what["sha256"]):
                return f"{name} {wrong}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{FILES} is not what was written there"
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name} cannot be read ({error.strerror})"
    return None


def _wrong(path: Path, size: int, digest: str) -> str | None:
    if not path.is_file():
        return "is gone"
    there = path.stat().st_size
    if there != size:
        return "is empty" if there == 0 else f"has {there} bytes where {size} were written"
    return None if _hash(path) == digest else "has another content than was written"


def _hash(path: Path) -> str:
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        else:
            digest.update(file.read(EDGE))
            file.seek(size - EDGE)
            digest.update(file.read(EDGE))
    return digest.hexdigest()


def resumed_from(config: DictConfig) -> Path | None:
    """The checkpoint that verl will load; None for a new run.

    Raises:
        StateError: the checkpoint that is asked for, or marked as the latest, is gone or damaged.
    """
    trainer = config.trainer
    out = Path(trainer.default_local_dir)
    if trainer.resume_mode == "disable":
        return None
    folder = _named(trainer.resume_from_path) if trainer.resume_mode == "resume_path" else _latest(out)
    if folder is None:
        return None
    if wrong := damage(folder):
        raise StateError(f"checkpoint {folder}: {wrong}; {_instead(folder.parent, _step(folder))}")
    return folder


def latest_step(out: Path) -> int:
    """The step that is marked as saved; 0 if there is none."""
    try:
        return int((out / MARKER).read_text())
    except (OSError, ValueError):
        return 0


def _named(path: str | None) -> Path:
    if not path or not re.fullmatch(r"global_step_\d+", Path(path).name):
        raise StateError(
            f"trainer.resume_from_path={path or 'null'}: the folder of a checkpoint is asked for, as in "
            "trainer.resume_from_path=RUN/global_step_50"
        )
    if str(path).endswith("/"):
        raise StateError(f"trainer.resume_from_path={path}: verl reads the step at its end: leave out the last slash")
    if not Path(path).is_dir():
        raise StateError(f"trainer.resume_from_path={path}: there is no such folder; {_instead(Path(path).parent)}")
    return Path(path)


def _latest(out: Path) -> Path | None:
    marker = out / MARKER
    if not marker.exists():
        if whole := _newest(out):
            raise StateError(f"{marker} is gone but there is a checkpoint: {_resume(whole)}, or {ANEW}")
        return None
    text = marker.read_text(errors="replace").strip()
    if not re.fullmatch(r"\d+", text, re.ASCII):
        raise StateError(f"{marker} is {'not a step' if text else 'empty'}; {_instead(out)}")
    folder = out / f"global_step_{int(text)}"
    if not folder.is_dir():
        raise StateError(f"{marker} names step {int(text)}, and {folder} is gone; {_instead(out)}")
    return folder


def _instead(out: Path, before: int | None = None) -> str:
    whole = _newest(out, before)
    return f"{_resume(whole)}, or {ANEW}" if whole else f"there is no other whole checkpoint: {ANEW}"


def _newest(out: Path, before: int | None = None) -> Path | None:
    """The newest whole checkpoint, of those before a step."""
    folders = [folder for folder in out.glob("global_step_*") if re.fullmatch(r"global_step_\d+", folder.name)]
    for folder in sorted(folders, key=_step, reverse=True):
        if (before is None or _step(folder) < before) and (folder / FILES).exists() and damage(folder) is None:
            return folder
    return None


def _resume(folder: Path) -> str:
    return f"go on from step {_step(folder)} with trainer.resume_mode=resume_path trainer.resume_from_path={folder}"


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("_")[2])
