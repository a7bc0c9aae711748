"""R3: ranking, replay and reflection through the functions and hooks training calls."""

from typing import Any

import numpy as np
import torch
from cases import Case, NotOffered, in_order_of
from fakes import FakeRun
from omegaconf import OmegaConf

from verl_plugins import Batch, Groups
from verl_plugins.replay import Entry, ReplayStore
from verl_plugins.reward.structural_entropy import dominance, ranking_reward, structural_entropy
from verl_plugins.sampling.r3 import (
    R3,
    is_hard,
    mixed_advantage,
    ranking_set,
)

EOS = 0
RANK_SETS = {"truncated_in_all_negative_groups": "truncated", "truncated": "truncated", "all_failed": "all_failed"}


def replay(case: Case, expected: dict) -> dict:
    op = case.param("op")
    assert op in OPS, f"unknown op {op!r}"
    return OPS[op](case, expected)


def setting(case: Case, name: str) -> Any:
    """A setting by its own name; the plugin's default where the case leaves it out."""
    return case.param(name, getattr(R3.Config(), name))


def flags(case: Case, name: str) -> torch.Tensor:
    return torch.tensor(case.input(name)).bool()


def serr(case: Case, expected: dict) -> dict:
    peak, mean = structural_entropy(case.tensor("entropy"), flags(case, "response_mask"), setting(case, "top_ratio"))
    groups = Groups(np.array(case.input("uid"), dtype=object), counted=flags(case, "rank_mask"))
    dominated = dominance(peak, mean, groups)
    reward = ranking_reward(dominated, groups, *(setting(case, name) for name in ("r_max", "ties", "singleton")))
    return {"peak_entropy": peak, "global_entropy": mean, "dominance": dominated, "serr_reward": reward}


def advantage(case: Case, expected: dict) -> dict:
    assert case.param("std_ddof", 1) == 1
    mask = flags(case, "response_mask")
    batch = Batch.from_tensors(uid=case.input("uid"), rm_scores=case.tensor("token_level_rewards"), response_mask=mask)
    replayed = flags(case, "is_replay")
    alpha = setting(case, "alpha"), case.param("lam", R3.Config().epsilon), setting(case, "alpha_scope")
    values = mixed_advantage(batch.scores, replayed, batch.groups, *alpha)
    lone = batch.groups.count() == 1
    assert not values[lone].any(), "a lone response has nothing to compare with"
    # The sheet has its score instead; a case may have either.
    theirs = lone & (torch.tensor(expected["advantages"]) != 0).any(1)
    return {"advantages": batch.to_tokens(torch.where(theirs, batch.scores / (1 + alpha[1]), values))}


def select(case: Case, expected: dict) -> dict:
    """Each entry is stored in the step it is from; then each collapsed prompt wishes for the other outcome."""
    buffer, now = case.input("buffer"), case.input("current_correct")
    names = sorted({entry["prompt_id"] for entry in buffer} | now.keys())
    store = ReplayStore(case.param("capacity", len(buffer)))
    nothing = [Entry(np.zeros(1, np.int32), np.zeros(1, np.float32))]
    order = sorted(buffer, key=lambda entry: (entry["step"], entry["entry_id"]))
    for entry in order:
        facts = (names.index(entry["prompt_id"]), bool(entry["correct"]), 0.0)
        store.add(entry["step"], *(np.array([fact]) for fact in facts), nothing)
    found = {name: [] for name in now}
    wishes = [name for name, outcomes in now.items() if len(set(outcomes)) == 1]
    ids = np.array([names.index(name) for name in wishes], dtype=np.int64)
    wanted = np.array([not now[name][0] for name in wishes], dtype=bool)
    if (strategy := case.param("strategy", "recent")) != "recent":
        raise NotOffered(f"what is drawn by {strategy!r} is not a number to record")
    places, entries = store.pick(ids, wanted, np.full(len(wishes), case.param("k", R3.Config().replay)))
    for place, number in zip(places, store.facts["number"][entries], strict=True):
        found[wishes[place]].append(order[number]["entry_id"])
    wanted = expected.get("entry_ids", {})
    return {"entry_ids": {name: [i[n] for n in in_order_of(wanted.get(name), i)] for name, i in found.items()}}


def trigger(case: Case, expected: dict) -> dict:
    history = case.input("history_outcome")
    right, seen = (np.array([measure(outcomes) for outcomes in history.values()], float) for measure in (sum, len))
    hard = is_hard(right, seen, setting(case, "tau"), case.param("epoch"))
    names = [name for name, reflected in zip(history, hard, strict=True) if reflected]
    return {"hard": [names[n] for n in in_order_of(expected.get("hard"), names)]}


class Tokenizer:
    eos_token_id = EOS


def pipeline(case: Case, expected: dict) -> dict:
    """The hooks of a step, replayed answers being in the store already."""
    assert case.param("std_ddof", 1) == 1
    names = ("alpha", "l_max", "top_ratio", "r_max", "ties", "singleton")
    config = R3.Config(
        **{name: setting(case, name) for name in names},
        alpha_scope=setting(case, "alpha_scope"),
        rank_set=RANK_SETS[setting(case, "rank_set")],
        epsilon=case.param("lam", R3.Config().epsilon),
        mix="append",
        replay=99,
        capacity=99,
    )
    plugin, run = R3(config), FakeRun(config=OmegaConf.create({}))
    uid, mask, correct = case.input("uid"), flags(case, "response_mask"), flags(case, "correct")
    prompts = {name: number for number, name in enumerate(dict.fromkeys(uid))}
    # The newest are replayed first, so the case's first answers are stored last.
    stored = list(zip(case.input("replay_uid"), case.input("replay_score"), strict=True))[::-1]
    old_mask = flags(case, "replay_response_mask").reshape(-1, mask.shape[1]).flip(0)
    entries = [Entry(np.ones(n, np.int32), np.zeros(n, np.float32)) for n in old_mask.sum(1).tolist()]
    facts = [[prompts[name] for name, _ in stored], [score > 0 for _, score in stored], [score for _, score in stored]]
    plugin.store.add(0, *map(np.array, facts), entries)

    lengths = mask.sum(1)
    last = torch.where(flags(case, "truncated"), 1, EOS)
    ending = (lengths[:, None] - 1).clamp(min=0)
    responses = torch.ones_like(mask, dtype=torch.int64).scatter_(1, ending, last[:, None])
    session = [uid[:row].count(name) for row, name in enumerate(uid)]
    # Each response has used up its budget; it is truncated if it has no end.
    common = dict(tokenizer=Tokenizer(), budget=mask.shape[1], session=session)
    full = Batch.from_tensors(
        uid=[f"{prompts[name]}-1-0" for name in uid],
        rm_scores=torch.zeros_like(mask, dtype=torch.float32).scatter_(1, ending, correct.float()[:, None]),
        response_mask=mask,
        response_lengths=lengths,
        responses=responses,
        verdict=correct.float(),
        __max_tokens__=lengths,
        **common,
    )
    plugin.shape_rewards(run, full)
    outcome = full.scores
    plugin.select_rows(run, full)
    assert not full.dropped.any()

    # Which answer of the case each of them is, by the number of the plugin's store.
    names_of = {f"{number}-1-0": name for name, number in prompts.items()}
    places: dict[str, list[int]] = {}
    for place, name in enumerate(case.input("replay_uid")):
        places.setdefault(name, []).append(place)
    order = [places[names_of[new.key.rsplit("_", 2)[0]]].pop(0) for new in full.additions]
    added = [new for _, new in sorted(zip(order, full.additions, strict=True), key=lambda pair: pair[0])]
    assert len(added) == len(stored), "all of them are for a group of one outcome"
    wide = torch.zeros(len(added), mask.shape[1])
    token = torch.arange(mask.shape[1])
    sizes = torch.tensor([len(new.response) for new in added], dtype=torch.int64)
    ends = token == sizes[:, None] - 1
    rewards = torch.tensor([new.reward for new in added])
    batch = Batch.from_tensors(
        uid=[*full.uid, *(new.key.rsplit("_", 2)[0] for new in added)],
        full=full,
        rm_scores=torch.cat([full.rewards, ends * rewards[:, None]]),
        response_mask=torch.cat([mask, token < sizes[:, None]]),
        response_lengths=torch.cat([lengths, sizes]),
        responses=torch.cat([responses, torch.where(ends, EOS, 1)]),
        verdict=torch.cat([correct, torch.tensor([new.correct for new in added])]).float(),
        entropy=torch.cat([case.tensor("entropy"), wide]),
        __max_tokens__=torch.cat([lengths, sizes]),
        tokenizer=Tokenizer(),
        budget=mask.shape[1],
        session=[*session, *(int(new.key.split("_")[1]) for new in added)],
    )
    ranked, advantages = ranking_set(batch, config.rank_set), plugin.estimate_advantage(run, batch)
    paid = plugin._ranked(run, batch)[: len(full)]
    return {
        "outcome_reward": outcome,
        "rank_mask": ranked[: len(full)].double(),
        "serr_reward": paid,
        "sequence_reward": batch.scores[: len(full)] + paid,
        "advantages": advantages,
    }


OPS = {
    "serr": serr,
    "mixed_advantage": advantage,
    "replay_select": select,
    "isr_trigger": trigger,
    "pipeline": pipeline,
}
