"""My method: the rule by hand."""

import torch
from my_method.method import MyMethod, alike

from verl_plugins import Batch, Groups
from verl_plugins.testing import FakeRun


def test_by_hand() -> None:
    scores, groups = torch.tensor([0.0, 1.0, 1.0, 1.5]), Groups(["a", "b", "b", "a"])
    assert alike(scores, groups, distance=0.0).tolist() == [False, True, True, False]
    assert alike(scores, groups, distance=1.5).all()


def test_one_group_remains() -> None:
    batch = Batch.from_tensors(uid=["0-1-0"] * 2, rm_scores=torch.ones(2, 1), response_mask=torch.ones(2, 1))
    MyMethod(MyMethod.Config()).select_rows(FakeRun(), batch)
    assert not batch.dropped.any()
