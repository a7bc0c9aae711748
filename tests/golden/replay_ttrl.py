"""TTRL: the hooks that vote, reward and drop, on the votes of one prompt."""

from types import SimpleNamespace

import torch
from cases import Case
from fakes import FakeRun
from omegaconf import OmegaConf

from verl_plugins import Batch
from verl_plugins.reward.ttrl import Ttrl, majority

END = 2
METRICS = ("majority_ratio", "label_accuracy", "reward_accuracy", "ground_truth_ratio")


def replay(case: Case, expected: dict) -> dict:
    answers, truth = case.input("answers"), case.input("ground_truth")
    n, kept = len(answers), case.param("n_samples_per_prompt")
    assert case.param("tie_break", "first_seen") == "first_seen", "there is no other rule"
    plugin = Ttrl(Ttrl.Config(n_votes=n, grader=case.param("grader", "math"), missing=case.param("missing")))
    batch = Batch.from_tensors(
        uid=["5-1-0"] * n,
        rm_scores=torch.zeros(n, 2),
        response_mask=torch.ones(n, 2, dtype=torch.bool),
        responses=torch.full((n, 2), END),
        response_lengths=torch.full((n,), 2),
        answer=answers,
        acc=[float(answer == truth) for answer in answers],
        reward_model=[{"ground_truth": truth}] * n,
        budget=2,
        tokenizer=SimpleNamespace(eos_token_id=END),
    )
    run = FakeRun(config=OmegaConf.create({"actor_rollout_ref": {"rollout": {"n": kept}}}))
    given = plugin.answers(batch)
    plugin.shape_rewards(run, batch)
    plugin.select_rows(run, batch)

    codes = plugin.votes(given)[0]
    winner, ballots = majority(codes, batch.groups.index.numpy(), batch.session.numpy(), 1)
    label = given[winner[0]] if winner[0] >= 0 else ""
    return {name: run.metrics[name] for name in METRICS} | {
        "majority_answer": label or None,
        "majority_count": ballots[0],
        "rewards": batch.scores,
        "train_rewards": batch.scores[~batch.dropped],
    }
