"""Whether a ground truth answers anything: what converting data and looking at it take from the scorer."""

from verl_plugins.reward.words import is_answer

__all__ = ["is_answer"]
