"""TTRL: the hooks that vote, reward and drop, on the votes of one prompt."""

from types import SimpleNamespace

import torch
from cases import Case, NotOffered
from fakes import FakeRun
from omegaconf import OmegaConf

from verl_plugins import Batch
from verl_plugins.reward.math_verify import Comparer
from verl_plugins.reward.ttrl import Ttrl, majority

END = 2
METRICS = ("majority_ratio", "label_accuracy", "reward_accuracy", "ground_truth_ratio")


def is_right(answer: str | None, truth: str | None, grader: str) -> bool:
    if not answer or truth is None or grader == "exact":
        return bool(answer) and answer == truth
    return Comparer(1).compare(answer, truth).correct


def replay(case: Case, expected: dict) -> dict:
    answers, truth = case.input("answers"), case.input("ground_truth")
    n, kept = len(answers), case.param("n_samples_per_prompt")
    if (rule := case.param("tie_break", "first_seen")) != "first_seen":
        raise NotOffered(f"ties are never broken by {rule!r}")
    grader, missing = case.param("grader", "math"), case.param("missing", "excluded")
    plugin = Ttrl(Ttrl.Config(n_votes=n, grader=grader, missing=missing))
    batch = Batch.from_tensors(
        uid=["5-1-0"] * n,
        rm_scores=torch.zeros(n, 2),
        response_mask=torch.ones(n, 2, dtype=torch.bool),
        responses=torch.full((n, 2), END),
        response_lengths=torch.full((n,), 2),
        answer=answers,
        acc=[float(is_right(answer, truth, grader)) for answer in answers],
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
    blank = "" if expected.get("majority_answer") == "" and winner[0] >= 0 else None
    return {name: run.metrics.get(name) for name in METRICS} | {
        "majority_answer": label or blank,
        "majority_count": ballots[0],
        "rewards": batch.scores,
        "train_rewards": batch.scores[~batch.dropped],
    }
