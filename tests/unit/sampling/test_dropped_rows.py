"""What is learnt and logged of a step is about all that was rolled out, whatever rows are left to train on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeDataset, FakeRun, FakeTokenizer
from omegaconf import OmegaConf

from verl_plugins import Batch, Plugin
from verl_plugins.composition import manager, manifest
from verl_plugins.composition.settings import typed

PROMPTS, TOKENS, END = 4, 6, FakeTokenizer.eos_token_id
RIGHT = [1, 0, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1]
CUT = [4, 5, 12]
CONFIG = {
    "data": {"train_batch_size": 4, "max_prompt_length": 99, "max_response_length": TOKENS},
    "actor_rollout_ref": {"rollout": {"n": 4}},
}
METHODS = [
    ("vade", {}),
    ("vade", {"metric": "acc", "correct_threshold": 0.7}),
    ("mopps", {"decay": 0.5}),
    ("sage", {}),
    ("sage", {"variant": "sage-light"}),
    ("siri", {}),
    ("prompt_augmentation", {}),
    ("r3", {}),
]


def rolled_out(rows: Any, full: Batch | None = None, wrong: bool = False) -> Batch:
    """These rows of four groups of four; `wrong`: everything that can be counted says something else."""
    rows = np.asarray(rows)
    lengths = torch.tensor([TOKENS if row in CUT else 2 + row % 3 for row in rows])
    mask = torch.arange(TOKENS) < lengths[:, None]
    right = torch.tensor([float(RIGHT[row]) for row in rows])
    right = 1 - right if wrong else right
    ends = torch.tensor([7 if row in CUT else END for row in rows])
    return Batch.from_tensors(
        uid=[f"{row // 4}-2-0" for row in rows],
        session=[row % 4 for row in rows],
        full=full,
        rm_scores=torch.zeros(mask.shape).scatter_(1, lengths[:, None] - 1, right[:, None]),
        response_mask=mask,
        response_lengths=lengths,
        responses=torch.full(mask.shape, 65).scatter_(1, lengths[:, None] - 1, ends[:, None]) * mask,
        rollout_log_probs=-mask.float(),
        acc=right.tolist(),
        __max_tokens__=[TOKENS - row % 2 * (row not in CUT) for row in rows],
        hint_used=[row // 4 % 4 for row in rows],
        hints=[f'{{"level_1": "{row // 4}"}}' for row in rows],
        format_name=["plain" if row < 8 else "boxed" for row in rows],
        format_reward=torch.tensor([float(row % 2) for row in rows]),
        r3_reflective=torch.tensor([float(row // 4 == 1) for row in rows]),
        tokenizer=FakeTokenizer(),
        budget=TOKENS,
    )


def built(name: str, options: dict[str, Any]) -> Plugin:
    cls = manager.load(manifest.find(name, manifest.entries()))
    return cls(typed(cls.Config, options, f"plugins.{name}"))


def observed(name: str, options: dict[str, Any], batch: Batch) -> tuple[dict[str, Any], dict[str, float]]:
    plugin = built(name, options)
    run = FakeRun(dataset=FakeDataset(PROMPTS), config=OmegaConf.create(CONFIG), step=2)
    plugin.observe(run, batch)
    return plugin.state_dict(), run.metrics


@pytest.mark.parametrize(("name", "options"), METHODS, ids=[f"{name}-{options}" for name, options in METHODS])
@pytest.mark.parametrize("kept", [[1, 2, 6, 13], [0], list(range(4, 16))])
def test_observes_what_was_rolled_out(name, options, kept):
    full = rolled_out(range(16))
    state, metrics = observed(name, options, full)
    part = rolled_out(kept, full=rolled_out(range(16)), wrong=True)
    after, logged = observed(name, options, part)
    assert logged == pytest.approx(metrics)
    for key, value in state.items():
        np.testing.assert_array_equal(after[key], value, err_msg=key)


@pytest.mark.parametrize("name", ["vade", "mopps"])
def test_what_was_believed_and_what_happened_go_together(name):
    """The correlation is that of the belief before the step with the outcome, positive if the belief was good."""
    plugin = built(name, {})
    run = FakeRun(dataset=FakeDataset(PROMPTS), config=OmegaConf.create(CONFIG), step=2)
    right, wrong = ("right", "wrong") if name == "mopps" else ("alpha", "beta")
    plugin._prepare(PROMPTS)
    getattr(plugin, right)[:], getattr(plugin, wrong)[:] = [4, 0, 8, 6], [4, 8, 0, 2]
    plugin.observe(run, rolled_out(range(16)))
    believed = (np.array([4, 0, 8, 6]) + 1) / 10
    outcome = np.array(RIGHT).reshape(4, 4).mean(1)
    assert run.metrics["predicted_vs_observed_corr"] == pytest.approx(np.corrcoef(believed, outcome)[0, 1])
    assert run.metrics["predicted_vs_observed_corr"] > 0.9
    names = ("effective_ratio", "solve_none", "solve_all", "seen_fraction")
    assert [run.metrics[name] for name in names] == [0.5, 0.25, 0.25, 1]
    mass = getattr(plugin, right) + getattr(plugin, wrong)
    assert run.metrics["evidence_mass_mean"] == pytest.approx(mass.mean())
