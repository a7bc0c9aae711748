"""My method: training ends when the rollouts are right often enough.

After the first step in which the share of right responses is at least `enough`.
"""

from dataclasses import dataclass
from typing import Any

from verl_plugins import Plugin, Run, hookimpl, setting

ACCURACY = "health/accuracy"


class MyMethod(Plugin):
    """An end by what was reached."""

    name = "my_method"

    @dataclass
    class Config:
        enough: float = setting(0.99, "share of right responses that ends training", gt=0)

    @hookimpl
    def on_step_end(self, run: Run, metrics: dict[str, Any]) -> None:
        if metrics[ACCURACY] >= self.config.enough:
            run.stop(f"{ACCURACY} is {metrics[ACCURACY]:.3f}, enough is {self.config.enough}")
