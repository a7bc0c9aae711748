"""My method: when training ends, by hand."""

import pytest
from my_method.method import MyMethod

from verl_plugins.testing import FakeRun


@pytest.mark.parametrize(
    ("accuracy", "reason"), [(0.5, None), (0.8, "health/accuracy is 0.800, enough is 0.8"), (0.0, None)]
)
def test_by_hand(accuracy: float, reason: str | None) -> None:
    run = FakeRun()
    MyMethod(MyMethod.Config(enough=0.8)).on_step_end(run, {"health/accuracy": accuracy})
    assert run.stopped == reason
