"""My method: a running average of the accuracy is logged; training stays as it is.

a_s = keep * a_{s-1} + (1 - keep) * accuracy of step s, and a_1 the accuracy of step 1. It is saved with the checkpoint.
"""

from dataclasses import dataclass
from typing import Any

from verl_plugins import Batch, Plugin, Run, hookimpl, setting


def averaged(before: float | None, value: float, keep: float) -> float:
    """The next average."""
    return value if before is None else keep * before + (1 - keep) * value


class MyMethod(Plugin):
    """A memory of outcomes."""

    name = "my_method"

    @dataclass
    class Config:
        keep: float = setting(0.9, "weight of the average so far", ge=0, lt=1)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.accuracy: float | None = None

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        correct = batch.full.correct  # of all responses, those that no other plugin dropped included
        self.accuracy = averaged(self.accuracy, float(correct.float().mean()), self.config.keep)
        run.log({"accuracy": self.accuracy})

    def state_dict(self) -> dict[str, Any]:
        return {"accuracy": self.accuracy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accuracy = state["accuracy"]
