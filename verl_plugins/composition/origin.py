"""From where an installed package came (PEP 610), and how to install it again.

Never by a bare name from an index: a name that is only known on this machine may belong to anybody there.
"""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit


def reinstall(name: str) -> str:
    """What to do about an installed package whose plugins or recipes cannot be used."""
    uninstall = f"pip uninstall {shlex.quote(name)}"
    url, editable = _origin(name)
    if not url.startswith("file:"):
        came = f", installed from {url}," if url else ""
        return f"ask whoever gave you the package {name}{came} to correct it, or {uninstall}"
    folder = _folder(url)
    if not folder.exists():
        return f"{uninstall}: {folder}, from where it was installed, is gone"
    return f"correct its code or entry points, then {_install(folder, editable)}, or {uninstall}"


def install(requirement: str) -> str:
    """The command that installs `requirement`; this package, and packages with plugins, from where they came."""
    from packaging.requirements import Requirement

    asked = Requirement(requirement)
    url, editable = _origin(asked.name)
    extras = f"[{','.join(sorted(asked.extras))}]" if asked.extras else ""
    if url.startswith("file:") and _folder(url).exists():
        return _install(_folder(url), editable, extras)
    if url:
        return f"pip install {shlex.quote(f'{asked.name}{extras} @ {url}')}"
    return f"pip install '{requirement}'"


def _install(folder: Path, editable: bool, extras: str = "") -> str:
    return f"pip install {'-e ' * editable}{shlex.quote(f'{folder}{extras}')}"


def _folder(url: str) -> Path:
    return Path(unquote(urlsplit(url).path))


def _origin(name: str) -> tuple[str, bool]:
    """(URL, whether editable) of what pip wrote down when it installed; '' for a package from an index."""
    try:
        written = json.loads(distribution(name).read_text("direct_url.json") or "{}")
        return str(written.get("url", "")), bool(written.get("dir_info", {}).get("editable"))
    except (PackageNotFoundError, OSError, ValueError, AttributeError):
        return "", False
