"""R3 step after step, against the rules of its replay written out once more."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import torch
from fakes import FakeTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_r3 import make_run, method

from verl_plugins import Batch
from verl_plugins.sampling.r3 import REFLECTIVE

END, BUDGET, PROMPTS = FakeTokenizer.eos_token_id, 6, 3
ANSWERS = st.lists(st.sampled_from(["right", "wrong", "cut", "empty"]), min_size=1, max_size=4)
STEP = st.lists(st.tuples(st.integers(0, PROMPTS - 1), ANSWERS), min_size=1, max_size=4)
"""Draws of prompts, some of them twice, with one to four answers each."""


def rolled_out(
    step: int, draws: list[tuple[int, list[str]]]
) -> tuple[Batch, list[tuple[str, int, str, int, list[int]]]]:
    """The batch of a step, and uid, session, kind, prompt and tokens of each row in the order of the keys."""
    rows = []
    for number, (prompt, kinds) in enumerate(draws):
        for session, kind in enumerate(kinds):
            length = {"right": 3, "wrong": 4, "cut": BUDGET, "empty": 0}[kind]
            tokens = [65 + (7 * step + 3 * number + session) % 60] * length
            if kind in ("right", "wrong"):
                tokens[-1] = END
            rows.append((f"{prompt}-{step}-{number}", session, kind, prompt, tokens))
    lengths = torch.tensor([len(row[4]) for row in rows])
    right = torch.tensor([float(row[2] == "right") for row in rows])
    batch = Batch.from_tensors(
        uid=[row[0] for row in rows],
        session=[row[1] for row in rows],
        rm_scores=torch.nn.functional.pad(right[:, None], (2, BUDGET - 3)),
        response_mask=torch.arange(BUDGET) < lengths[:, None],
        responses=torch.tensor([row[4] + [0] * (BUDGET - len(row[4])) for row in rows]),
        response_lengths=lengths,
        verdict=right,
        rollout_log_probs=torch.zeros(len(rows), BUDGET),
        tokenizer=FakeTokenizer(),
        budget=BUDGET,
        **{REFLECTIVE: [0.0] * len(rows)},
    )
    return batch, sorted(rows)


@settings(max_examples=40, deadline=None)
@given(st.lists(STEP, min_size=2, max_size=4), st.sampled_from(["replace", "append"]), st.integers(1, 3))
def test_step_after_step(steps, mix, capacity):
    """Collapsed groups get the newest stored answers of the other kind, of their prompt and of earlier steps only."""
    plugin = method(mix=mix, capacity=capacity, replay=2, l_max=12)
    stored: dict[tuple[int, bool], list[tuple[int, list[int]]]] = defaultdict(list)
    seen: Counter[int] = Counter()
    solved: Counter[int] = Counter()
    for step, draws in enumerate(steps, start=1):
        run = make_run(step, rows=PROMPTS)
        batch, rows = rolled_out(step, draws)
        plugin.shape_rewards(run, batch)
        plugin.select_rows(run, batch)
        plugin.observe(run, batch)

        groups, joined, ages, served, kinds = defaultdict(list), {}, [], 0, Counter()
        for row in rows:
            groups[row[0]].append(row)
        for uid, own in groups.items():
            right = [row[2] == "right" for row in own]
            kind = "right" if all(right) else "mixed" if any(right) else "wrong"
            kinds[kind] += 1
            wanted = min(2, len(own) - 1) if mix == "replace" else 2
            others = [] if kind == "mixed" else stored[own[0][3], kind == "wrong"]
            newest = others[::-1][:wanted]
            joined[uid] = [tokens for _, tokens in newest]
            ages += [step - stored_at for stored_at, _ in newest]
            served += bool(joined[uid])
        found = defaultdict(list)
        for new in batch.additions:
            found[new.key.rpartition("_")[0].rpartition("_")[0]].append(new.response.tolist())
        dropped = Counter(batch.uid[batch.dropped.numpy()].tolist())
        for uid, answers in joined.items():
            assert found[uid] == answers
            assert dropped[uid] == (len(answers) if mix == "replace" else 0)
        for row in rows:
            seen[row[3]] += 1
            solved[row[3]] += row[2] == "right"
            if row[4]:
                kept = stored[row[3], row[2] == "right"]
                kept.append((step, row[4]))
                del kept[:-capacity]
        logged, collapsed = run.metrics, kinds["wrong"] + kinds["right"]
        assert [logged[f"groups_{name}"] for name in ("all_wrong", "all_right", "mixed")] == [
            *(kinds[name] for name in ("wrong", "right", "mixed")),
        ]
        assert logged["replayed_rows"] == len(batch.additions) == sum(map(len, joined.values()))
        assert logged["replay_hit_rate"] == (served / collapsed if collapsed else 0)
        assert logged.get("replay_age_steps") == pytest.approx(sum(ages) / len(ages) if ages else None)
        assert logged["truncated_fraction"] == pytest.approx(sum(row[2] == "cut" for row in rows) / len(rows))
        assert logged["not_stored"] == sum(row[2] == "empty" for row in rows)
        assert logged["buffer_right"] == sum(len(kept) for (_, right), kept in stored.items() if right)
        assert logged["buffer_wrong"] == sum(len(kept) for (_, right), kept in stored.items() if not right)
        assert logged["buffer_queries"] == len({prompt for (prompt, _), kept in stored.items() if kept})
        assert plugin.seen.tolist() == [seen[prompt] for prompt in range(PROMPTS)]
        assert plugin.right.tolist() == [solved[prompt] for prompt in range(PROMPTS)]
