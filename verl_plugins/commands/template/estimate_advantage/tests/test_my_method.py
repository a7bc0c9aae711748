"""My method: the formula by hand."""

import pytest
import torch
from my_method.method import centred_ranks

from verl_plugins import Groups


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.0, 10.0, 1.0], [-2.0, 2.0, 0.0]),  # ranks 0, 2, 1 of K-1 = 2
        ([1.0, 0.0, 0.0, 0.0], [2.0, -2 / 3, -2 / 3, -2 / 3]),  # ranks 3 and three times 1
        ([0.3, 0.3, 0.3], [0.0, 0.0, 0.0]),
        ([5.0], [0.0]),
    ],
)
def test_by_hand(scores: list[float], expected: list[float]) -> None:
    found = centred_ranks(torch.tensor(scores), Groups(["a"] * len(scores)), bound=2.0)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_groups_do_not_mix() -> None:
    scores, groups = torch.tensor([0.0, 7.0, 1.0, 3.0]), Groups(["a", "b", "a", "b"])
    assert centred_ranks(scores, groups, bound=1.0).tolist() == [-1.0, 1.0, 1.0, -1.0]
