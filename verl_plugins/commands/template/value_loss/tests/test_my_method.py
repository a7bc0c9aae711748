"""My method: the formula by hand."""

import torch
from my_method.method import caution


def test_by_hand() -> None:
    values, returns = torch.tensor([[[1.0, 2.0], [1.0, 0.0]]]), torch.tensor([[1.0, 1.0]])
    assert caution(values, returns, 3.0).tolist() == [[3.0, 1.0]]
    assert caution(values, returns, 1.0).tolist() == [[1.0, 1.0]]
