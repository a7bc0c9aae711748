"""The laws every plugin must keep, and the recipe."""

import subprocess
import sys

from verl_plugins.testing import check_plugin


def test_laws() -> None:
    check_plugin("rank_advantage")


def test_recipe() -> None:
    command = [sys.executable, "-m", "verl_plugins", "run", "grpo+rank_advantage", "--preset", "cpu", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "#   estimate_advantage: rank_advantage (" in done.stdout
