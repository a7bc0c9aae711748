"""Rows that `select_rows` added or brought back from earlier steps: in the queue, and with their old log-probs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from agents import EOS, Agents, Servers, answer, prompt
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_plugins import Batch, DataError
from verl_plugins.bridge import additions, sending
from verl_plugins.bridge.additions import store_additions
from verl_plugins.bridge.rows import OFFSET, TRUNCATED, VERDICT
from verl_plugins.bridge.trainer import PluginTrainerSync
from verl_plugins.replay import StoredRow

PAST = StoredRow(
    uid="5-1-3",
    step=2,
    context=np.array([1, 2, 3, 9], np.int32),
    offset=1,
    response=np.array([4, 5, 6], np.int32),
    old_log_probs=np.array([-0.5, -0.25, -2.0], np.float32),
    reward=0.75,
    correct=True,
    truncated=True,
    columns={"gain": -0.5},
)
OTHER = {"raw_prompt": [{"role": "user", "content": "3+4="}], "reward_model": {"ground_truth": "7"}, "index": 5}
OTHER |= {"data_source": "others", "extra_info": {"index": 5}, "unknown": 1}


class Store:
    """TransferQueue in this process."""

    def __init__(self, rows: dict[str, dict[str, Any]]) -> None:
        self.rows = rows

    def get(self, keys: list[str], partition_id: str, select_fields: list[str] | None = None) -> Any:
        chosen = [
            {name: row[name] for name in select_fields or row if name in row} for row in (self.rows[k] for k in keys)
        ]
        return list_of_dict_to_tensordict(chosen)

    def put(self, keys: list[str], partition_id: str, fields: Any, tags: Any = None) -> KVBatchMeta:
        for place, key in enumerate(keys):
            one = fields[place]
            self.rows.setdefault(key, {}).update({name: one[name] for name in one.keys()})  # noqa: SIM118
        return KVBatchMeta(partition_id=partition_id, keys=list(keys), tags=[{} for _ in keys], fields=[])


@pytest.fixture
def store(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Two responses to one prompt, for which a plugin has put a number."""
    agents.generate(agents.worker(Servers(lambda *_: answer([7, 8, EOS]))), prompt(hint="of the step"))
    for row in agents.queue.rows.values():
        row["gain"] = torch.tensor(9.0)
    queue = Store(agents.queue.rows)
    for module in (additions, sending):
        monkeypatch.setattr(module.tq, "kv_batch_get", queue.get)
        monkeypatch.setattr(module.tq, "kv_batch_put", queue.put)
    return queue


def opened(store: Store) -> tuple[KVBatchMeta, Batch]:
    keys = sorted(store.rows)
    fields = {"response_mask": torch.ones(len(keys), 3), "rm_scores": torch.zeros(len(keys), 3)}
    batch = Batch.from_tensors(
        uid=["0-1-0"] * 2, session=[0, 1], response_lengths=torch.full((2,), 3), budget=16, **fields
    )
    tag = {"status": "success", "prompt_len": 4, "response_len": 3, "seq_len": 7, "global_steps": 4}
    tags = [{**tag, "min_global_steps": 3, "max_global_steps": 3} for _ in keys]
    return KVBatchMeta(partition_id="train", keys=keys, tags=tags), batch


class TestStored:
    def test_a_row_of_an_earlier_step(self, store: Store) -> None:
        meta, batch = opened(store)
        batch.bring_back([PAST])
        asked: list[int] = []
        found = store_additions(meta, batch, EOS, lambda number: asked.append(number) or OTHER)
        row, like = store.rows["5-1-3_0_0"], store.rows["0-1-0_0_0"]
        assert found.keys == [*meta.keys, "5-1-3_0_0"] and asked == [5]
        assert row.keys() == like.keys()
        assert {name: row[name].tolist() for name in ("prompts", "responses", "input_ids", "position_ids")} == {
            "prompts": [1, 2, 3, 9],
            "responses": [4, 5, 6],
            "input_ids": [1, 2, 3, 9, 4, 5, 6],
            "position_ids": [0, 1, 2, 3, 4, 5, 6],
        }
        assert row["response_mask"].tolist() == row["loss_mask"].tolist() == [1, 1, 1]
        assert row["rm_scores"].tolist() == [0, 0, 0.75] and row["rollout_log_probs"].tolist() == [-0.5, -0.25, -2.0]
        assert [row[name].item() for name in (OFFSET, TRUNCATED, VERDICT, "gain")] == [1, True, 1, -0.5]
        assert row["uid"] == "5-1-3" and like["gain"] == 9
        assert row["extra_fields"] == {"reward_extra_info": {"acc": 1.0, "score": 0.75}}
        for name in OTHER.keys() & row.keys():
            assert row[name] == OTHER[name], name
        assert row["hint"] == "of the step", "a column that only this step's prompts have"

    def test_its_tag_says_which_policy_wrote_it(self, store: Store) -> None:
        meta, batch = opened(store)
        batch.bring_back([PAST])
        tag = store_additions(meta, batch, EOS, lambda _: OTHER).tags[-1]
        lengths = {"prompt_len": 4, "response_len": 3, "seq_len": 7}
        assert tag == {"status": "success", "global_steps": 2, "min_global_steps": 1, "max_global_steps": 1, **lengths}

    def test_a_further_response_to_a_row_in_segments_is_one_to_its_prompt(self, store: Store) -> None:
        store.rows["0-1-0_0_0"][OFFSET] = torch.tensor(1)
        meta, batch = opened(store)
        batch.add(0, np.array([4, EOS]), reward=1.0, correct=True, rollout_log_probs=np.zeros(2))
        store_additions(meta, batch, EOS, lambda _: OTHER)
        row, like = store.rows["0-1-0_2_0"], store.rows["0-1-0_0_0"]
        assert row["prompts"].tolist() == like["prompts"].tolist()[:-1] and row[OFFSET] == 0
        assert row["raw_prompt"] == like["raw_prompt"] and not row[TRUNCATED]

    def test_a_number_that_is_not_put_in_this_step(self, store: Store, sentence: Any) -> None:
        for row in store.rows.values():
            del row["gain"]
        meta, batch = opened(store)
        batch.bring_back([PAST])
        with pytest.raises(DataError) as refusal:
            store_additions(meta, batch, EOS, lambda _: OTHER)
        sentence(refusal.value, "'gain'", "5-1-3", "not put")

    def test_fields_of_its_tokens_that_nobody_kept(self, store: Store, sentence: Any) -> None:
        for row in store.rows.values():
            row["routed_experts"] = torch.zeros(7, 1)
        meta, batch = opened(store)
        batch.bring_back([PAST])
        with pytest.raises(DataError) as refusal:
            store_additions(meta, batch, EOS, lambda _: OTHER)
        sentence(refusal.value, "routed_experts")


@pytest.fixture
def stages() -> Any:
    """The trainer, as far as these stages ask it."""
    made = object.__new__(PluginTrainerSync)
    made._past, made.needs, made.notes, made._told_of_skipping = {}, frozenset(), [], False
    made.plugins, made.seed, made.global_steps = [], 0, 7
    made.reporter = SimpleNamespace(note=made.notes.append)
    made._for_workers = lambda batch, *_: batch
    return made


class TestOldLogProbs:
    def test_stored_ones_come_back_behind_the_pass_that_computes_them_all(
        self, store: Store, stages: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        meta, batch = opened(store)
        batch.bring_back([PAST, PAST])
        meta = store_additions(meta, batch, EOS, lambda _: OTHER)

        def by_the_current_policy(self: Any, batch: Any, metrics: Any) -> Any:
            for key in batch.keys:
                store.rows[key]["old_log_probs"] = torch.full((3,), -1.0)
            return batch

        monkeypatch.setattr(PPOTrainer, "_compute_old_log_prob", by_the_current_policy)
        stages._past = {new.key: new.past.old_log_probs for new in batch.additions}
        assert stages._compute_old_log_prob(meta, {}) is meta
        found = {key: row["old_log_probs"].tolist() for key, row in store.rows.items()}
        assert found == {
            "0-1-0_0_0": [-1] * 3,
            "0-1-0_1_0": [-1] * 3,
            **dict.fromkeys(("5-1-3_0_0", "5-1-3_1_0"), [-0.5, -0.25, -2.0]),
        }


class TestSkippedUpdate:
    def test_neither_actor_nor_critic_is_updated(self, stages: Any) -> None:
        stages._full, meta, metrics = SimpleNamespace(update_skipped=True), object(), {}
        assert stages._update_actor(meta, metrics) is meta and stages._update_critic(meta, metrics) is meta
        assert not metrics

    def test_it_is_said_once(self, stages: Any) -> None:
        stages._full = SimpleNamespace(update_skipped=True)
        for _ in range(3):
            stages._update_actor(object(), {})
        assert len(stages.notes) == 1 and stages.notes[0].startswith("step 7 is not trained on")


class TestRowsOfAPrompt:
    """verl's mini-batches are prompts times rows of a prompt: a number where rows are responses of the step."""

    def resized(self, stages: Any, rows: int, kept: int, past: bool = False, turns: bool = False) -> int | None:
        uid = [f"{row % 2}-1-0" for row in range(rows)]
        fields = {"response_mask": torch.ones(rows, 1), "rm_scores": torch.zeros(rows, 1)}
        stages._full = Batch.from_tensors(uid=uid, turn=[row // 2 * turns for row in range(rows)], **fields)
        stages._past = {"5-1-3_0_0": PAST.old_log_probs} if past else {}
        return stages._resized([*stages._full.keys, *map(str, range(rows))][:kept])

    def test_as_many_of_each(self, stages: Any) -> None:
        assert self.resized(stages, 8, 4) == 2 and self.resized(stages, 8, 12) == 6

    def test_as_they_were_or_not_of_one_size(self, stages: Any) -> None:
        assert self.resized(stages, 8, 8) is None and self.resized(stages, 8, 5) is None

    def test_segments_and_rows_of_earlier_steps(self, stages: Any) -> None:
        assert self.resized(stages, 8, 4, turns=True) is None and self.resized(stages, 8, 4, past=True) is None
