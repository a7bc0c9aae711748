"""Workers that are forked: what Ray draws at random is each process's own."""

from __future__ import annotations

import subprocess
import sys

import pytest

IMPORT = """
import contextlib, importlib
from verl_plugins.cpu import preload
with {how}:
    for module in preload.MODULES:
        importlib.import_module(module)
print(preload.shares_ids())
"""


@pytest.mark.parametrize(("how", "shared"), [("preload.unused_ids()", "False"), ("contextlib.nullcontext()", "True")])
def test_names_of_objects_are_not_shared_after_the_imports_of_a_run(how: str, shared: str) -> None:
    """Without care they are: importing verl defines actors, whose names use the generator that forks then copy."""
    done = subprocess.run([sys.executable, "-c", IMPORT.format(how=how)], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == shared


def test_a_generator_that_was_used_is_refused(tmp_path) -> None:
    code = f"""
from pathlib import Path
from ray._raylet import NodeID
from verl_plugins.cpu import preload
NodeID.from_random()
with preload.Preload(Path({str(tmp_path)!r})):
    print("forked")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "would give different objects one name" in done.stderr.replace("\n", " ")
    assert "forked" not in done.stdout
