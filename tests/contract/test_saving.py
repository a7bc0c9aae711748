"""A kill while a checkpoint is being saved leaves the old one or the new one, with matching state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

KILLS = 100


def test_a_hundred_kills_at_random_instants(tmp_path: Path) -> None:
    script = Path(__file__).with_name("saver.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path, str(KILLS)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # verl leaves a lock there for each folder it makes
    assert done.returncode == 0, done.stderr[-2000:]
    progress = json.loads(done.stdout.splitlines()[-1])
    assert len(progress) == KILLS and min(progress) >= 0
    assert sum(progress) >= KILLS / 4, "hardly any checkpoint was completed between the kills"
    assert list(tmp_path.glob("*/.plugins.*")), "no kill fell into the writing of plugin state"
