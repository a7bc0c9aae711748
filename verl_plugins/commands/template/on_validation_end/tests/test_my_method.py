"""My method: scores by hand."""

import pytest
from my_method.method import MyMethod, score

from verl_plugins import DataError
from verl_plugins.testing import FakeRun


def test_by_hand() -> None:
    metrics = {"val-core/a/acc/mean@4": 0.25, "val-core/b/acc/mean@4": 0.75, "val-core/a/acc/best@4/mean": 1.0}
    assert score(metrics) == 0.5
    with pytest.raises(DataError, match="no metric val-core"):
        score({"val-aux/a/acc/mean@4": 1.0})


def test_the_best_stays() -> None:
    run, plugin = FakeRun(), MyMethod(MyMethod.Config())
    for value, best in ((0.2, 0.2), (0.6, 0.6), (0.4, 0.6)):
        plugin.on_validation_end(run, {"val-core/a/acc/mean@1": value})
        assert run.metrics == {"best": best}
