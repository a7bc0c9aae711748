"""What separate_async puts aside is a copy, and metrics of several updates become one."""

from __future__ import annotations

import pytest
import torch

from verl_plugins.bridge.separate import copied
from verl_plugins.bridge.trainer import _together


def test_what_is_put_aside_does_not_follow_the_weights():
    live = torch.zeros(3)
    spec = object()
    saved = copied(({"w": (live, spec)}, spec))
    live += 1
    assert torch.equal(saved[0]["w"][0], torch.zeros(3))
    assert saved[0]["w"][1] is spec and saved[1] is spec


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        ("rollout/tokens", [3.0, 5.0], 8.0),
        ("rollout/responses", [3.0, 5.0], 8.0),
        ("health/generated_tokens", [1.0, 1.0], 2.0),
        ("timing_s/health", [0.5, 0.25], 0.75),
        ("health/lag_max", [2.0, 5.0], 5.0),
        ("rollout/tokens_per_prompt_max", [9.0, 4.0], 9.0),
        ("health/accuracy", [0.5, 0.25], 0.375),
        ("health/lag_mean", [1.0, 2.0], 1.5),
    ],
)
def test_updates_of_a_step_become_one_number(key, values, expected):
    assert _together(key)(values) == expected
