"""A spike of the learning rate: in its step only, and put back whatever happens."""

from __future__ import annotations

import pytest

from verl_plugins.optim.lr_spike import LrSpike
from verl_plugins.testing import FakeActor


def begun(step: int, mini_batch: int = 0) -> tuple[FakeActor, object]:
    actor = FakeActor()
    actor.step, actor.mini_batch = step, mini_batch
    actor.optimizer.add_param_group({"params": [], "lr": 5e-4})
    wrapped = LrSpike(LrSpike.Config(step=3, factor=10.0)).optimizer_step(actor)
    next(wrapped)
    return actor, wrapped


def rates(actor: FakeActor) -> list[float]:
    return [group["lr"] for group in actor.optimizer.param_groups]


@pytest.mark.parametrize(("step", "factor"), [(1, 1), (2, 1), (3, 10), (4, 1)])
@pytest.mark.parametrize("mini_batch", [0, 1])
def test_in_its_step(step: int, factor: int, mini_batch: int) -> None:
    actor, wrapped = begun(step, mini_batch)
    assert rates(actor) == pytest.approx([1e-3 * factor, 5e-4 * factor])
    assert actor.metrics == {"learning_rate": pytest.approx(1e-3 * factor)}
    with pytest.raises(StopIteration) as end:
        wrapped.send(1.5)
    assert end.value.value == 1.5
    assert rates(actor) == [1e-3, 5e-4]


@pytest.mark.parametrize("step", [2, 3])
def test_back_after_an_error(step: int) -> None:
    actor, wrapped = begun(step)
    with pytest.raises(ZeroDivisionError):
        wrapped.throw(ZeroDivisionError())
    assert rates(actor) == [1e-3, 5e-4]
