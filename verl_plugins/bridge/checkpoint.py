"""Plugin state inside verl's checkpoint folder: safetensors for arrays, JSON for the rest, no pickle.

`global_step_N/plugins/` holds `state.json` (format, step, dataset fingerprint; per process and plugin: version,
scalars) and `arrays.safetensors`. The folder is written under a temporary name and renamed, before verl writes its
"latest" marker: a kill leaves either the old checkpoint or the new one with its state.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from verl_plugins.errors import StateError
from verl_plugins.plugin import Plugin

FORMAT = 1
FOLDER = "plugins"
PROCESSES = ("driver", "actor", "critic")

States = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""process -> plugin -> what its state_dict returned."""


def save(checkpoint: Path, step: int, fingerprint: str, plugins: Iterable[Plugin], states: States) -> None:
    """Write all plugin state of a checkpoint."""
    versions = {plugin.name: plugin.version for plugin in plugins}
    arrays: dict[str, Tensor] = {}
    kept = {
        process: {name: _split(state, f"{process}/{name}", arrays) for name, state in by_plugin.items() if state}
        for process, by_plugin in states.items()
    }
    manifest = {"format": FORMAT, "step": step, "dataset": fingerprint, "versions": versions, "states": kept}
    folder, temporary = checkpoint / FOLDER, checkpoint / f".{FOLDER}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(arrays, temporary / "arrays.safetensors")
    (temporary / "state.json").write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def try_saving(states: States) -> None:
    """Make of all state what a checkpoint would hold, and throw it away.

    Raises:
        StateError: naming process, plugin and key of what cannot be saved.
    """
    arrays: dict[str, Tensor] = {}
    for process, by_plugin in states.items():
        for name, state in by_plugin.items():
            if not isinstance(state, Mapping):
                raise StateError(
                    f"state {process}/{name}: state_dict gave a {type(state).__name__}, and must give a dict"
                )
            _split(state, f"{process}/{name}", arrays)


@contextmanager
def open_whole(file: str | os.PathLike, mode: str = "r", **options: Any) -> Iterator[IO]:
    """`open` as a context manager; what is written (mode `w`) takes the file's place only once it is complete."""
    if "w" not in mode:
        with open(file, mode, **options) as opened:
            yield opened
        return
    temporary = f"{os.fspath(file)}.{os.getpid()}.{threading.get_ident()}"
    with open(temporary, mode, **options) as opened:
        yield opened
    os.replace(temporary, file)


def load(checkpoint: Path, step: int, fingerprint: str, plugins: Iterable[Plugin]) -> States:
    """Read what `save` wrote and make sure it belongs to this run.

    Raises:
        StateError: no state, another dataset, another plugin or another version of a plugin.
    """
    folder = checkpoint / FOLDER
    if not (folder / "state.json").is_file():
        raise StateError(
            f"checkpoint {checkpoint} has no plugin state ({FOLDER}/state.json); resume it with plain verl"
        )
    manifest = json.loads((folder / "state.json").read_text())
    _check(folder, manifest, step, fingerprint, {plugin.name: plugin.version for plugin in plugins})
    arrays = load_file(folder / "arrays.safetensors")
    return {
        process: {name: _join(state, f"{process}/{name}", arrays) for name, state in by_plugin.items()}
        for process, by_plugin in manifest["states"].items()
    }


def _check(folder: Path, manifest: dict, step: int, fingerprint: str, versions: dict[str, str]) -> None:
    saved = manifest["versions"]
    if manifest["format"] != FORMAT:
        raise StateError(f"{folder}: state format {manifest['format']}, this version reads {FORMAT}")
    if manifest["step"] != step:
        raise StateError(f"{folder}: state of step {manifest['step']} in the checkpoint of step {step}")
    if manifest["dataset"] != fingerprint:
        raise StateError(
            f"{folder}: saved with another training dataset (fingerprint {manifest['dataset']}, now {fingerprint}); "
            "resume with the same data.train_files in the same order, or start a new run with another --out"
        )
    if set(saved) != set(versions):
        raise StateError(
            f"{folder}: saved with plugins {_names(saved)}, this run has {_names(versions)}; "
            "resume with the same recipe"
        )
    for name, version in versions.items():
        if saved[name] != version:
            raise StateError(f"{folder}: state of plugin {name} version {saved[name]}, installed is version {version}")


def _names(versions: Iterable[str]) -> str:
    return ", ".join(sorted(versions)) or "none"


def _split(state: Mapping[str, Any], prefix: str, arrays: dict[str, Tensor]) -> dict[str, Any]:
    """Move tensors and arrays of a state into `arrays`; what stays is JSON."""
    kept: dict[str, Any] = {"json": {}, "numpy": [], "torch": []}
    for key, value in state.items():
        where = f"{prefix}/{key}"
        if not isinstance(key, str):
            raise StateError(f"state {where}: its key is a {type(key).__name__}, and must be a text")
        if isinstance(value, (Tensor, np.ndarray)):
            arrays[where] = _array(value, where)
            kept["torch" if isinstance(value, Tensor) else "numpy"].append(key)
        else:
            kept["json"][key] = _plain(value, where)
    return kept


def _array(value: Tensor | np.ndarray, where: str) -> Tensor:
    """A copy that shares memory with nothing."""
    try:
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
        if tensor.layout is not torch.strided:
            raise TypeError(f"its layout is {tensor.layout}")
        return tensor.detach().cpu().contiguous().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        kind = f"{type(value).__name__} of {value.dtype}"
        cause = str(error).split(". ")[0].rstrip(".")
        raise StateError(f"state {where}: a {kind} cannot be saved, keep numbers in it ({cause})") from error


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, float):
        return value  # NaN too, which equals nothing
    try:
        again = json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise StateError(
            f"state {where}: {type(value).__name__} can be saved neither as an array nor as JSON"
        ) from error
    if again != value:
        raise StateError(
            f"state {where}: JSON gives the {type(value).__name__} back as {again!r}, not as {value!r}; use lists in "
            "place of tuples, texts as keys, and no NaN inside"
        )
    return value


def _join(kept: Mapping[str, Any], prefix: str, arrays: Mapping[str, Tensor]) -> dict[str, Any]:
    state = dict(kept["json"])
    state |= {key: arrays[f"{prefix}/{key}"] for key in kept["torch"]}
    return state | {key: arrays[f"{prefix}/{key}"].numpy() for key in kept["numpy"]}
