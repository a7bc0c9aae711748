"""Sessions that fail: counted, told with their first cause, and nothing waits for them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl_plugins import DataError
from verl_plugins.bridge import rows as rows_module
from verl_plugins.bridge.drawing import MOST_DRAWN, DrawsPrompts
from verl_plugins.bridge.failures import Failures, explains
from verl_plugins.bridge.group import _number
from verl_plugins.bridge.rows import Publisher, RewardBatcher, Row
from verl_plugins.errors import RunError


def failures(asked: int, *errors: Exception, sessions: int = 1, finished: int = 0) -> Failures:
    found = Failures(asked, finished=finished)
    for number, error in enumerate(errors):
        found.note(error, f"prompt {number}", sessions)
    return found


class TestSentence:
    def test_share_first_cause_and_prompt(self) -> None:
        found = failures(128, ValueError("no box"), ValueError("no box"), sessions=8)
        assert found.sentence() == "16 of 128 sessions failed: ValueError: no box (prompt 0)"

    def test_other_causes_are_counted(self) -> None:
        found = failures(8, ValueError("a"), KeyError("b"), DataError("c"))
        assert found.sentence() == "3 of 8 sessions failed: ValueError: a (prompt 0), and 2 other causes, see verl.log"

    def test_of_several_workers_the_first_cause_is_the_first_worker_s(self) -> None:
        whole = Failures.together([failures(4), failures(4, KeyError("b")), failures(4, ValueError("a"), finished=1)])
        assert (whole.asked, whole.failed, whole.finished) == (12, 2, 1)
        assert whole.sentence().startswith("2 of 12 sessions failed: KeyError: 'b' (prompt 0), and 1 other cause")

    def test_what_was_taken_is_not_told_again(self) -> None:
        found = failures(4, ValueError("a"))
        assert found.take().failed == 1
        assert found.take() == Failures()


@pytest.mark.parametrize(
    ("found", "error", "expected"),
    [
        (failures(8, ValueError("a"), sessions=8), RuntimeError("anything"), True),
        (failures(8, ValueError("a")), ValueError("groups with no materializable trajectories"), True),
        (failures(8, ValueError("a")), RuntimeError("out of memory"), False),
        (failures(8), ValueError("no materializable"), False),
    ],
)
def test_verls_sentence_is_replaced_where_failed_sessions_explain_it(found, error, expected) -> None:
    assert explains(found, error) is expected


class TestPublishing:
    """Every group gets its status; a group that cannot be stored fails alone."""

    @pytest.fixture
    def stored(self, monkeypatch) -> dict[str, Any]:
        stored: dict[str, Any] = {}

        async def put(keys, partition_id, tags, fields=None) -> None:
            for key, tag in zip(keys, tags, strict=True):
                if key.startswith("bad"):
                    raise OSError(f"cannot store {key}")
                stored[key] = tag["status"]

        monkeypatch.setattr(rows_module.tq, "async_kv_batch_put", put)
        monkeypatch.setattr(rows_module, "list_of_dict_to_tensordict", list)
        return stored

    def publish(self, *groups: tuple[str, list[Row]], publisher: Publisher | None = None) -> list[Any]:
        publisher = publisher or Publisher()

        async def all_of_them() -> list[Any]:
            calls = [publisher.publish("train", rows, uid, "finished") for uid, rows in groups]
            return await asyncio.gather(*calls, return_exceptions=True)

        return asyncio.run(all_of_them())

    def row(self, key: str, step: int = 1, **fields: Any) -> Row:
        return Row(key, {"responses": torch.tensor([1, 2]), **fields}, {"status": "success", "global_steps": step})

    def test_one_that_cannot_be_stored_does_not_take_the_others_along(self, stored) -> None:
        results = self.publish(("a", [self.row("a_0")]), ("b", [self.row("bad_0")]), ("c", [self.row("c_0")]))
        assert [type(result) for result in results] == [type(None), OSError, type(None)]
        assert stored["a"] == stored["c"] == "finished" and "b" not in stored

    def test_log_probs_that_a_tool_loop_leaves_out_are_filled_in(self, stored) -> None:
        full, empty = self.row("a_0", rollout_log_probs=torch.ones(2)), self.row("b_0")
        assert self.publish(("a", [full]), ("b", [empty])) == [None, None]
        assert torch.equal(empty.fields["rollout_log_probs"], torch.zeros(2))

    def test_rows_with_other_columns_fail_by_themselves(self, stored) -> None:
        odd = self.row("b_0", surprise=torch.tensor(1.0))
        results = self.publish(("a", [self.row("a_0")]), ("b", [odd]), ("c", [self.row("c_0")]))
        assert isinstance(results[1], DataError) and "surprise" in str(results[1])
        assert stored["a"] == stored["c"] == "finished"

    @pytest.mark.parametrize("by_step", [True, False])
    def test_a_column_may_begin_and_end_with_a_step_where_steps_do_not_mix(self, stored, by_step) -> None:
        publisher, extra = Publisher(by_step), {"hint": torch.tensor(1.0)}
        results = []
        for step, fields in enumerate([{}, extra, extra, {}]):
            groups = [(f"{step}{name}", [self.row(f"{step}{name}_0", step, **fields)]) for name in "ab"]
            results += self.publish(*groups, publisher=publisher)
        assert [result is None for result in results] == [True, True, *[by_step] * 4, True, True]

    def test_within_a_step_it_is_refused_whenever_it_comes(self, stored) -> None:
        publisher = Publisher()
        assert self.publish(("a", [self.row("a_0", 7)]), publisher=publisher) == [None]
        (error,) = self.publish(("b", [self.row("b_0", 7, hint=torch.tensor(1.0))]), publisher=publisher)
        assert isinstance(error, DataError) and "has hint" in str(error)


def test_a_reward_message_that_fails_is_asked_for_session_by_session(monkeypatch) -> None:
    """One bad answer costs one session."""
    monkeypatch.setattr(rows_module, "_reward_input", lambda outputs, columns: list(outputs))

    async def score(outputs: list[str]) -> list[dict[str, Any]]:
        if "bad" in outputs:
            raise ValueError("cannot score")
        return [{"reward_score": float(len(output))} for output in outputs]

    worker = SimpleNamespace(compute_score_batch=SimpleNamespace(remote=score))

    async def run() -> list[Any]:
        return await RewardBatcher([worker])._send([("a", {}), ("bad", {}), ("ccc", {})])

    first, second, third = asyncio.run(run())
    assert (first["reward_score"], third["reward_score"]) == (1.0, 3.0)
    assert isinstance(second, ValueError)


@pytest.mark.parametrize("index", [3, 0, "3f2c-uuid", None, -1, 2.5, "七"])
def test_a_validation_prompt_s_index_can_be_anything(index) -> None:
    assert 0 <= _number(index) < 2**32
    assert _number(index) == _number(index)
    assert _number("a") != _number("b")


class TestDrawingForEver:
    class Trainer(DrawsPrompts):
        """As far as drawing asks it."""

        global_steps = 4

        def __init__(self, drawn: int) -> None:
            self.config = SimpleNamespace(data=SimpleNamespace(train_batch_size=16))
            self._draws = (4, drawn)

        def refuse_to_draw_for_ever(self) -> None:
            raise RunError("8 of 8 sessions failed: KeyError: 'a' (prompt 1)")

        def clock(self) -> Any:
            raise AssertionError("drawing goes on")

    def test_it_is_asked_whether_anything_comes_through(self) -> None:
        with pytest.raises(RunError):
            self.Trainer(MOST_DRAWN * 16)._next_train_batch()

    def test_but_not_before_some_batches(self) -> None:
        with pytest.raises(AssertionError, match="goes on"):
            self.Trainer(MOST_DRAWN * 16 - 1)._next_train_batch()
