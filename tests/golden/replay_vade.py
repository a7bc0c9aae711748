"""VADE: selection, update and evidence, one function per `op`."""

from types import SimpleNamespace

import numpy as np
import torch
from cases import Case, in_order_of
from fakes import FakeDataset, FakeRun

from verl_plugins import Batch
from verl_plugins.sampling.vade import (
    Vade,
    decay_and_add,
    draw,
    expected_gain,
    information_gain,
    posterior_mean,
    select,
)


def replay(case: Case, expected: dict) -> dict:
    op = case.param("op")
    assert op in OPS, f"unknown op {op!r}"
    return OPS[op](case, expected)


def state(case: Case) -> tuple[np.ndarray, np.ndarray]:
    return np.array(case.input("alpha"), dtype=float), np.array(case.input("beta"), dtype=float)


def decays(case: Case) -> tuple[float, float]:
    defaults = Vade.Config()
    return (
        case.param("lambda_selected", defaults.lambda_selected),
        case.param("lambda_unselected", defaults.lambda_unselected),
    )


def choice(case: Case, theta: np.ndarray, expected: dict) -> dict:
    eligible = case.input("eligible", None)
    if eligible is not None:
        eligible = np.array(eligible, dtype=bool)
    score = case.param("score", "infogain")
    ids = select(theta, eligible, case.param("batch_size"), score)
    order = in_order_of(expected.get("selected_ids"), ids)  # a step asks all of them
    return {"theta": theta, "score": information_gain(theta, score), "selected_ids": ids[order]}


def replay_select(case: Case, expected: dict) -> dict:
    return choice(case, np.array(case.input("theta")), expected)


def replay_greedy(case: Case, expected: dict) -> dict:
    return choice(case, posterior_mean(*state(case)), expected)


def replay_update(case: Case, expected: dict) -> dict:
    alpha, beta = state(case)
    columns = ("observed_ids", "correct", "n_rollouts")
    ids, correct, n = (np.array(case.input(key), dtype=np.int64) for key in columns)
    asked, place = np.unique(ids[n > 0], return_inverse=True)
    right, total = (np.bincount(place, values[n > 0], minlength=len(asked)) for values in (correct, n))
    decay_and_add(alpha, beta, asked, right, total, *decays(case))
    return {"alpha": alpha, "beta": beta}


def replay_select_then_update(case: Case, expected: dict) -> dict:
    return replay_select(case, expected) | replay_update(case, expected)


def batch_of(ids: np.ndarray, correct: np.ndarray, n: int) -> Batch:
    """One draw of each prompt with `n` responses, the first `correct` of which are right."""
    verdict = torch.from_numpy(np.arange(n)[None] < np.asarray(correct)[:, None]).float().flatten()[:, None]
    return Batch.from_tensors(
        uid=[f"{prompt}-1-0" for prompt in np.repeat(ids, n)],
        session=list(range(n)) * len(ids),
        rm_scores=verdict,
        response_mask=torch.ones_like(verdict),
    )


def replay_trajectory(case: Case, expected: dict) -> dict:
    """The hooks of the plugin, step after step; only the draw is given."""
    thetas, outcomes = np.array(case.input("theta")), np.array(case.input("correct_if_selected"))
    count, n, score = case.param("batch_size"), case.param("group_size"), case.param("score", "infogain")
    plugin = Vade(Vade.Config(*decays(case), score=score))
    run = FakeRun(dataset=FakeDataset(thetas.shape[1]))
    found = {"selected_ids": [], "alpha": [], "beta": [], "effective_ratio": []}
    for step, (theta, outcome) in enumerate(zip(thetas, outcomes, strict=True), start=1):
        run.step = step
        run.rng = lambda name, theta=theta: SimpleNamespace(beta=lambda p, q: theta.copy())
        ids = plugin.select_prompts(run, count)
        plugin.observe(run, batch_of(ids, outcome[ids], n))
        wanted = expected.get("selected_ids")
        found["selected_ids"].append(ids[in_order_of(wanted[step - 1] if wanted else None, ids)])
        found["alpha"].append(plugin.alpha.copy())
        found["beta"].append(plugin.beta.copy())
        found["effective_ratio"].append(run.metrics["effective_ratio"])
    return found


def replay_count(case: Case, expected: dict) -> dict:
    columns = ("prompt_id", "session_id", "output_index", "score", "is_padding")
    kinds = (np.int64, np.int64, np.int64, np.float64, bool)
    prompt, session, turn, score, padding = (np.array(case.input(k), t) for k, t in zip(columns, kinds, strict=True))
    real = ~padding
    batch = Batch.from_tensors(
        uid=[f"{name}-1-0" for name in prompt[real]],
        session=session[real],
        turn=turn[real],
        rm_scores=torch.tensor(score[real])[:, None],
        response_mask=torch.ones(int(real.sum()), 1),
        acc=score[real].tolist(),
    )
    plugin = Vade(Vade.Config(metric="acc", correct_threshold=case.param("correct_threshold", 0.5)))
    found = plugin.evidence(batch)
    order = in_order_of(expected.get("prompt_ids"), found[0])
    names = ("prompt_ids", "correct", "n_rollouts")
    return {name: values[order] for name, values in zip(names, found, strict=True)}


def replay_moments(case: Case, expected: dict) -> dict:
    alpha, beta = state(case)
    mean = posterior_mean(alpha, beta)
    return {
        "mean": mean,
        "var": mean * (1 - mean) / (alpha + beta + 3),
        "expected_infogain": expected_gain(alpha, beta),
        "expected_variance_score": expected_gain(alpha, beta, "variance"),
    }


def replay_frequency(case: Case, expected: dict) -> dict:
    alpha, beta = state(case)
    draws, count, score = case.param("min_draws"), case.param("batch_size"), case.param("score", "infogain")
    rng = np.random.default_rng(0)
    thetas = draw(rng, np.tile(alpha, (draws, 1)), np.tile(beta, (draws, 1)))
    chosen = np.argpartition(-information_gain(thetas, score), count - 1, axis=1)[:, :count]
    for theta, ids in zip(thetas[:2000], chosen[:2000], strict=True):
        assert set(select(theta, None, count, score)) == set(ids)
    return {"frequency": np.bincount(chosen.flatten(), minlength=len(alpha)) / draws}


def replay_simulate(case: Case, expected: dict) -> dict:
    """Training without a model: Bernoulli outcomes, the plugin's own draws."""
    true_p = np.array(case.input("true_p"))
    count, n, last = case.param("batch_size"), case.param("group_size"), case.param("measure_last")
    plugin = Vade(Vade.Config(*decays(case), score=case.param("score", "infogain")))
    run, outcomes = FakeRun(dataset=FakeDataset(len(true_p))), np.random.default_rng(1)
    ratios = []
    for run.step in range(1, case.param("steps") + 1):
        ids = plugin.select_prompts(run, count)
        plugin.observe(run, batch_of(ids, outcomes.binomial(n, true_p[ids]), n))
        ratios.append(run.metrics["effective_ratio"])
    return {"mean_effective_ratio": np.mean(ratios[-last:])}


OPS = {
    "select": replay_select,
    "select_greedy": replay_greedy,
    "update": replay_update,
    "select_then_update": replay_select_then_update,
    "trajectory": replay_trajectory,
    "count": replay_count,
    "moments": replay_moments,
    "frequency": replay_frequency,
    "simulate": replay_simulate,
}
