"""My method: learning rates by hand."""

import pytest
from my_method.method import MyMethod

from verl_plugins.testing import FakeActor


@pytest.mark.parametrize(("mini_batch", "rate"), [(0, 1e-3), (1, 5e-4), (3, 1.25e-4)])
def test_by_hand(mini_batch: int, rate: float) -> None:
    actor = FakeActor()
    actor.mini_batch = mini_batch
    step = MyMethod(MyMethod.Config(decay=0.5)).optimizer_step(actor)
    next(step)
    assert actor.optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    with pytest.raises(StopIteration) as end:
        step.send(1.5)
    assert end.value.value == 1.5
    assert actor.optimizer.param_groups[0]["lr"] == 1e-3
