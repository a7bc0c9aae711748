"""My method: a file that says how many steps were trained.

It lies beside the checkpoints, and is written only when training ended normally.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from verl_plugins import Plugin, Run, hookimpl, setting


class MyMethod(Plugin):
    """A word at the end."""

    name = "my_method"

    @dataclass
    class Config:
        file: str = setting("my_method.json", "name of the file in trainer.default_local_dir")

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        folder = Path(run.config.trainer.default_local_dir)
        folder.mkdir(parents=True, exist_ok=True)  # a run that saves no checkpoint has none
        (folder / self.config.file).write_text(json.dumps({"steps": run.step}) + "\n", encoding="utf-8")
