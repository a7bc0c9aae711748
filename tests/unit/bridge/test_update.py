"""An update whose loss or gradient is no number."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from verl_plugins.bridge.trainer import Stages
from verl_plugins.errors import RunError


@pytest.fixture
def trainer() -> Any:
    """As far as the look at an update asks it."""
    trainer = object.__new__(Stages)
    trainer.global_steps, trainer._told_of_gradient, trainer.notes = 7, False, []
    trainer.reporter = SimpleNamespace(note=trainer.notes.append)
    return trainer


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_no_number_ends_the_run(trainer, loss, sentence) -> None:
    with pytest.raises(RunError) as error:
        trainer._look_at_update({"actor/loss": loss, "actor/grad_norm": loss})
    sentence(error.value, "step 7", "the actor's loss", str(loss))


def test_a_gradient_alone_is_said_once(trainer) -> None:
    for norm in (1.0, float("nan"), float("inf")):
        trainer._look_at_update({"actor/loss": 0.5, "actor/grad_norm": norm})
    assert len(trainer.notes) == 1
    assert trainer.notes[0].startswith("warning: step 7: the gradient norm is not finite")


def test_ordinary_updates_pass(trainer) -> None:
    trainer._look_at_update({"actor/loss": -0.5, "actor/grad_norm": 3.0})
    trainer._look_at_update({})
    assert trainer.notes == []
