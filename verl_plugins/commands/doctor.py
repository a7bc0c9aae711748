"""What works on this machine, and the one command that mends what does not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from verl_plugins.composition import manifest, recipe, separate
from verl_plugins.composition.cache import CACHE_VARIABLE, cache_folder
from verl_plugins.composition.identity import PACKAGE
from verl_plugins.composition.origin import install, reinstall
from verl_plugins.composition.scratch import leftovers
from verl_plugins.errors import PluginError

GIB = 1 << 30
LEAST_MEMORY, LEAST_DISK = 4 * GIB, 2 * GIB
CENSUS = "verl_plugins.bridge.census"
ANSWER = "census: "
"""What the lines of the census begin with; a JSON pair of who and fault follows."""
WITHOUT_FLASH_ATTENTION = (
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    "actor_rollout_ref.model.use_remove_padding=false",
)
TRANSFERS = {
    "nccl": {"cupy": "cupy-cuda12x"},
    "nixl": {"cupy": "cupy-cuda12x", "nixl": "nixl"},
    "mooncake": {"mooncake": "mooncake-transfer-engine"},
}
"""What verl's checkpoint engines import besides torch, and what pip calls it."""
OK, ABSENT, BROKEN = "ok", "absent", "broken"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    state: str
    """`ok`; `absent`: something that is only needed for some runs; `broken`: must be mended."""
    found: str
    mend: str = ""
    """A command, or what to do."""


def examine(workers: bool = False, address: str | None = None) -> Iterator[Finding]:
    """Look at everything, one finding after the other; with `workers`, start processes of every kind in Ray too."""
    yield from _python()
    yield from _requirements()
    yield from _imports()
    yield from _device()
    yield from _attention()
    yield from _resources()
    yield from _plugins()
    yield from _presets()
    yield from _environment()
    if workers:
        yield from _workers(address)


def examine_run(recipe: str, preset: str | None = None, overrides: Sequence[str] = ()) -> Iterator[Finding]:
    """What `run` would look at before it starts: reward, model and data, or the one sentence that refuses them."""
    from verl_plugins.composition.compose import compose
    from verl_plugins.composition.look import look
    from verl_plugins.composition.needs import check

    try:
        composed = compose(recipe, preset, overrides)
        seen = look(composed, check(composed))
    except PluginError as error:
        yield Finding(f"run {recipe}", BROKEN, str(error), "as the sentence says")
        return
    yield Finding(f"run {recipe}", OK, "can start")
    yield from _transfer(composed.config)
    for line in seen:
        what, _, found = line.partition(": ")
        yield Finding(f"run {recipe}, {what}", OK, found)


def _transfer(config: Any) -> Iterator[Finding]:
    """What carries weights to the servers of `separate_async`; the run's machines need it, whatever this one has."""
    if not separate.is_chosen(config):
        return
    backend = config.actor_rollout_ref.rollout.checkpoint_engine.backend
    for package, named in TRANSFERS.get(backend, {}).items():
        there = find_spec(package) is not None
        found = f"package {package} is {'' if there else 'not '}installed here"
        yield Finding(
            f"checkpoint engine {backend}", OK if there else ABSENT, found, "" if there else f"pip install {named}"
        )


def plain(finding: Finding) -> dict[str, str]:
    """A finding as data."""
    return asdict(finding)


def _python() -> Iterator[Finding]:
    own = sys.version_info[:2]
    fits = (3, 10) <= own <= (3, 12)
    found = f"{sys.version.split()[0]} in {sys.prefix}"
    yield Finding("Python", OK if fits else BROKEN, found, "" if fits else "install Python 3.10, 3.11 or 3.12")


def _requirements() -> Iterator[Finding]:
    """What this package requires of others, without extras."""
    wrong = []
    asked = [Requirement(text) for text in requires(PACKAGE) or []]
    asked = [one for one in asked if not one.marker or one.marker.evaluate({"extra": ""})]
    for one in asked:
        try:
            have = version(one.name)
        except PackageNotFoundError:
            have = "not installed"
        if have == "not installed" or not one.specifier.contains(have, prereleases=True):
            wrong.append((one, have))
    yield Finding(PACKAGE, OK, f"{version(PACKAGE)}, {len(asked) - len(wrong)} of {len(asked)} requirements met")
    for one, have in wrong:
        yield Finding(one.name, BROKEN, f"{have}, needed is {one.specifier or 'any version'}", f"pip install '{one}'")


def _imports() -> Iterator[Finding]:
    for module, package in (("torch", "torch"), ("transformers", "transformers"), ("ray", "ray"), ("verl", "verl")):
        try:
            import_module(module)
            yield Finding(module, OK, version(package))
        except Exception as error:
            extra = "[cpu]" if module == "torch" else ""
            missing = isinstance(error, ImportError)
            mend = install(f"{PACKAGE}{extra}") if missing else f"pip install -U {package}"
            yield Finding(module, BROKEN, f"cannot be imported: {_cause(error)}", mend)


def _device() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            yield Finding(f"GPU {number}", OK, f"{about.name}, {about.total_memory / GIB:.0f} GiB")
    else:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        yield Finding("GPU", ABSENT, f"none that torch sees ({built})", "use --preset cpu")


def _attention() -> Iterator[Finding]:
    """On GPUs verl loads models with flash attention unless told otherwise, and value models always."""
    import torch

    if not torch.cuda.is_available():
        return
    try:
        import_module("flash_attn")
        yield Finding("flash-attn", OK, version("flash-attn"))
    except Exception as error:
        mend = f"pip install flash-attn --no-build-isolation, or run with {' '.join(WITHOUT_FLASH_ATTENTION)}"
        yield Finding("flash-attn", ABSENT, f"verl's default attention cannot be imported: {_cause(error)}", mend)


def _resources() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    enough = memory.available >= LEAST_MEMORY
    found = f"{os.cpu_count()} cores, {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB memory free"
    yield Finding(
        "machine", OK if enough else BROKEN, found, "" if enough else f"free {LEAST_MEMORY // GIB} GiB of memory"
    )
    for what, folder, mend in (
        ("temporary files", Path(tempfile.gettempdir()), "set TMPDIR to a folder with room"),
        ("cache", cache_folder(), f"set {CACHE_VARIABLE} to a folder with room that you may write to"),
    ):
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        fits = free >= LEAST_DISK and os.access(there, os.W_OK)
        yield Finding(what, OK if fits else BROKEN, f"{folder}, {free / GIB:.1f} GiB free", "" if fits else mend)


def _plugins() -> Iterator[Finding]:
    installed = manifest.entries()
    plugins = manifest.manifests(installed)
    names = [plugin.name for plugin in plugins]
    usable = [plugin for plugin in plugins if not plugin.broken and names.count(plugin.name) == 1]
    owners = sorted({plugin.owner for plugin in usable})
    yield Finding("plugins", OK, f"{len(usable)} from {', '.join(owners) or 'nowhere'}")
    for plugin in plugins:
        if plugin.broken:
            mend = reinstall(plugin.distribution)
            yield Finding(f"plugin {plugin.name}", BROKEN, f"of {plugin.owner}: {plugin.broken}", mend)
        elif names.count(plugin.name) > 1:
            yield Finding(f"plugin {plugin.name}", BROKEN, f"brought twice, by {plugin.owner} too", "uninstall one")
    folders = manifest.folders(installed)
    for folder in folders:
        if folder.broken:
            yield Finding(
                "recipes", BROKEN, f"of {folder.distribution}: {folder.broken}", reinstall(folder.distribution)
            )
    recipes = recipe.recipes(folders)
    yield Finding("recipes", OK, f"{sum(not one.broken for one in recipes)} of {len(recipes)} readable")
    for one in recipes:
        if one.broken:
            yield Finding(f"recipe {one.name}", BROKEN, one.broken, f"mend {one.file}")


def _presets() -> Iterator[Finding]:
    """Whether hardware and packages are there for each preset."""
    import torch

    for preset in recipe.presets(manifest.folders(manifest.entries())):
        if preset.broken:
            yield Finding(f"preset {preset.name}", BROKEN, preset.broken, f"mend {preset.file}")
            continue
        settings = preset.overrides
        trainer, rollout = settings.get("trainer", {}), settings.get("actor_rollout_ref", {}).get("rollout", {})
        needed = dict(preset.requires)
        if rollout.get("name") in ("vllm", "sglang") and not needed:
            needed = {rollout["name"]: f"verl-plugins[{rollout['name']}]"}
        missing = [tell for package, tell in needed.items() if not _installed(package)]
        on_cpu = trainer.get("device") == "cpu" or bool(preset.base)
        gpus = 0 if on_cpu else int(trainer.get("n_gpus_per_node", 1)) - torch.cuda.device_count()
        name = f"preset {preset.name}"
        if gpus > 0:
            yield Finding(name, ABSENT, f"{gpus} GPUs are missing on this machine", "run it where they are")
        elif missing:
            mend = " && ".join(map(install, missing))
            yield Finding(name, ABSENT, f"{', '.join(needed)} not installed", mend)
        else:
            yield Finding(name, OK, preset.title)


def _environment() -> Iterator[Finding]:
    every = {entry.name for entry in manifest.installed() if not manifest.is_recipes(entry)}
    for variable in (manifest.ALLOW_VARIABLE, manifest.BLOCK_VARIABLE):
        if variable not in os.environ:
            continue
        unknown = [name for name in manifest.names_in(variable) if name not in every]
        found = f"set to {os.environ[variable]!r}"
        if unknown:
            yield Finding(variable, BROKEN, f"{found}; not installed: {', '.join(unknown)}", f"correct {variable}")
        else:
            yield Finding(variable, OK, found)
    if "RAY_ADDRESS" in os.environ:
        yield Finding("RAY_ADDRESS", OK, f"runs go to the cluster at {os.environ['RAY_ADDRESS']}")
    left = leftovers()
    if left:
        size = sum(file.lstat().st_size for folder in left for file in folder.rglob("*") if file.is_file())
        found = f"{len(left)} temporary folders of killed runs, {size / GIB:.2f} GiB"
        yield Finding("leftovers", ABSENT, found, "the next run removes them, or verl-plugins doctor --clean")


def _workers(address: str | None) -> Iterator[Finding]:
    """One process of each kind on each node: what it imports, and whether it has this process's code.

    In a process of its own, since Ray reads the token of its cluster when it is imported.
    """
    names = [entry.name for entry in manifest.entries() if not manifest.is_recipes(entry)]
    command = [sys.executable, "-m", CENSUS, json.dumps({"plugins": names, "address": address})]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            for line in process.stdout:
                if line.startswith(ANSWER):
                    who, fault = json.loads(line.removeprefix(ANSWER))
                    yield Finding(who, BROKEN if fault else OK, fault or "same packages as here")
        if process.returncode:
            errors.seek(0)
            lines = errors.read().strip().splitlines()
            mend = (
                "see whether the address is right and the cluster runs (ray status)"
                if address
                else "ray stop, try again"
            )
            yield Finding("Ray", BROKEN, lines[-1] if lines else f"exit code {process.returncode}", mend)


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def _cause(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, PluginError) else f"{type(error).__name__}: {text}"


def print_report(findings: Iterator[Finding]) -> int:
    """Print each finding as it is made; 1 when something is broken."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    states: list[str] = []
    for one in findings:
        mark = {OK: "ok     ", ABSENT: "absent ", BROKEN: "BROKEN "}[one.state]
        style: Any = {OK: "green", ABSENT: "yellow", BROKEN: "red"}[one.state]
        console.print(mark, style=style, end="")
        console.print(f"{one.what}: {one.found}" + (f"\n         -> {one.mend}" if one.mend else ""))
        states.append(one.state)
    broken = states.count(BROKEN)
    console.print(f"{broken} broken" if broken else "nothing is broken; what is absent is needed for some runs only")
    return int(broken > 0)
