"""Installs packages of third parties, as pip does, into a folder of their own; nothing is downloaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "third_party_plugin"
OFFLINE = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")


def install(site: Path, *packages: Path) -> None:
    """`pip install --target site packages…`."""
    subprocess.run([sys.executable, "-m", "pip", "install", *OFFLINE, "--target", site, *packages], check=True)
