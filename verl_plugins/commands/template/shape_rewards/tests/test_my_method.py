"""My method: the formula by hand."""

import torch
from my_method.method import MyMethod, cost

from verl_plugins import Batch
from verl_plugins.testing import FakeRun


def test_by_hand() -> None:
    found = cost(torch.tensor([0, 5, 10]), torch.tensor([10, 10, 20]), weight=0.5)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.25, 0.25]))


def test_in_a_batch() -> None:
    batch = Batch.from_tensors(
        uid=["0-1-0", "0-1-0"],
        rm_scores=torch.tensor([[0.0, 1.0], [0.0, 0.0]]),
        response_mask=torch.ones(2, 2),
        response_lengths=torch.tensor([2, 1]),
        budget=4,
    )
    run, plugin = FakeRun(), MyMethod(MyMethod.Config(weight=1.0))
    plugin.shape_rewards(run, batch)
    torch.testing.assert_close(batch.scores, torch.tensor([0.5, -0.25]))
    assert run.metrics == {"cost_mean": 0.375}
