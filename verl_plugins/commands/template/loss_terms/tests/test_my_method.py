"""My method: the formula by hand."""

import torch
from my_method.method import distance


def test_by_hand() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    old = torch.tensor([[-1.0, -1.0, -5.0]])
    found = distance(log_probs, old)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.5, 2.0]]))
    found.sum().backward()
    torch.testing.assert_close(log_probs.grad, torch.tensor([[0.0, -1.0, 2.0]]))
