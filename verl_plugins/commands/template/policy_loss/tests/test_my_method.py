"""My method: the formula by hand."""

import torch
from my_method.method import doubt


def test_by_hand() -> None:
    log_probs = torch.tensor([[1.0, 0.5, 0.25]]).log()
    torch.testing.assert_close(doubt(log_probs, 2.0), torch.tensor([[0.0, 0.25, 0.5625]]))
    torch.testing.assert_close(doubt(log_probs, 0.0), torch.ones(1, 3))
