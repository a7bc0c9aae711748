"""My method: the formula by hand, the laws every plugin must keep, and the recipe."""

import subprocess
import sys

import torch
from my_method.method import doubt

from verl_plugins.testing import check_plugin


def test_by_hand() -> None:
    log_probs = torch.tensor([[1.0, 0.5, 0.25]]).log()
    torch.testing.assert_close(doubt(log_probs, 2.0), torch.tensor([[0.0, 0.25, 0.5625]]))
    torch.testing.assert_close(doubt(log_probs, 0.0), torch.ones(1, 3))


def test_laws() -> None:
    check_plugin("my_method")


def test_recipe() -> None:
    command = [sys.executable, "-m", "verl_plugins", "run", "grpo+my_method", "--preset", "cpu", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "#   policy_loss: my_method (wraps)" in done.stdout
