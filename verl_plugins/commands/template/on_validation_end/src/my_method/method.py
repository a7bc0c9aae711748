"""My method: the best validation so far is logged; training stays as it is.

The score of a validation is the mean over its data sources of what verl calls `val-core/<source>/…/mean@n`.
"""

from collections.abc import Mapping
from typing import Any

from verl_plugins import DataError, Plugin, Run, hookimpl


def score(metrics: Mapping[str, float]) -> float:
    """One number for a validation."""
    found = [value for key, value in metrics.items() if key.startswith("val-core/") and "/mean@" in key]
    if not found:
        raise DataError("my_method: the validation has no metric val-core/…/mean@…")
    return sum(found) / len(found)


class MyMethod(Plugin):
    """A memory of validations."""

    name = "my_method"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.best: float | None = None

    @hookimpl
    def on_validation_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        now = score(metrics)
        self.best = now if self.best is None else max(self.best, now)
        run.log({"best": self.best})

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]
