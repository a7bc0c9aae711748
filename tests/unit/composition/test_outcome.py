"""What a plugin gives is checked when it returns, and the plugin that gave it is blamed, not the next one."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from verl_plugins import DataError, Plugin, PluginError, hookimpl
from verl_plugins.advantage.grpo import Grpo
from verl_plugins.batch import Batch
from verl_plugins.composition import outcome
from verl_plugins.composition.blame import sentence as said_of
from verl_plugins.composition.blame import whose
from verl_plugins.composition.manager import Plugins
from verl_plugins.distilled import Distilled
from verl_plugins.errors import ResultError
from verl_plugins.hookspecs import FIRST_RESULT
from verl_plugins.replay import StoredRow
from verl_plugins.services import Prompt, Prompts, Rollout, Segment, Verdict
from verl_plugins.testing import FakeDataset, FakeRun
from verl_plugins.tokens import Tokens

NAN = float("nan")
PAST = StoredRow("5-1-0", 1, np.array([3]), 0, np.array([4]), np.array([-0.5]), 1.0, True, False)


def plugin(plugin_name: str, stage: str, function: Callable, **options: Any) -> Plugin:
    """An instance of a throw-away class whose stage is the function."""
    function.__name__ = stage
    return type(plugin_name, (Plugin,), {"name": plugin_name, stage: hookimpl(**options)(function)})(None)


def batch() -> Batch:
    """Four rows of three tokens."""
    return Batch.from_tensors(
        uid=["1-1-0", "1-1-0", "2-1-1", "2-1-1"],
        response_mask=torch.ones(4, 3),
        rm_scores=torch.eye(4, 3),
        response_lengths=torch.full((4,), 3),
    )


def tokens(**changed: Any) -> Tokens:
    """Four rows of three tokens in the loss."""
    plain = {name: torch.zeros(4, 3) for name in ("log_probs", "old_log_probs", "advantages")}
    fields = {**plain, "response_mask": torch.ones(4, 3), "config": OmegaConf.create(), **changed}
    return Tokens(step=7, mini_batch=1, micro_batch=2, **fields)


def prompts() -> Prompts:
    """Three of them."""
    return Prompts([Prompt(number, {"raw_prompt": [{"role": "user", "content": "?"}]}) for number in range(3)])


def rollout(text: str = "") -> Rollout:
    return Rollout(text, [1], 0.0, False, False, {}, object())


def call(stage: str, *members: Plugin, **arguments: Any) -> Any:
    result = getattr(Plugins(members, check=outcome.check_in_training).hook, stage)(**arguments)
    return asyncio.run(result) if asyncio.iscoroutine(result) else result


def gives(value: Any) -> Callable:
    """An implementation that gives this."""
    return lambda self: value


def wrong_at(row: int, token: int, value: float = NAN) -> torch.Tensor:
    values = torch.zeros(4, 3)
    values[row, token] = value
    return values


def edit(change: Callable[[Prompt], Any]) -> Callable:
    return lambda self, prompts: change(prompts[1])


def gives_async(value: Any) -> Callable:
    async def rollout_group(self):
        return value

    return rollout_group


RUN = FakeRun(FakeDataset(10))
TWICE = rollout()


def in_segments(*places: tuple[int, int], ids: tuple[int, ...] = (1, 2, 3)) -> Rollout:
    """A response of three tokens, its segments taken from one that begins with `ids`."""
    whole = dataclasses.replace(rollout(), response_ids=[1, 2, 3])
    whole.segments = [Segment(dataclasses.replace(rollout(), response_ids=list(ids)), *place) for place in places]
    return whole


TAUGHT = Distilled(
    hidden=torch.zeros(3, 2),
    weight=torch.zeros(5, 2),
    teacher_ids=torch.zeros(3, 1),
    teacher_log_probs=torch.ones(3, 1),
    temperature=torch.ones(3),
    config=None,
    step=7,
    mini_batch=1,
    micro_batch=2,
)

CASES: list[tuple[str, Callable, dict[str, Any], str]] = [
    ("select_prompts", gives([1, 1, 2]), {"run": RUN, "count": 3}, "2 distinct prompt ids; 3 are asked"),
    ("select_prompts", gives([1, 2]), {"run": RUN, "count": 3}, "2 distinct prompt ids; 3 are asked"),
    ("select_prompts", gives(np.array([1, 2, 10])), {"run": RUN, "count": 3}, "the id 10, outside the 10 rows"),
    ("select_prompts", gives([1, 2, -1]), {"run": RUN, "count": 3}, "the id -1, outside"),
    ("select_prompts", gives([1, 2, 2.5]), {"run": RUN, "count": 3}, "returned 2.5 among the prompt ids"),
    ("select_prompts", gives([True, 2, 3]), {"run": RUN, "count": 3}, "returned True among"),
    ("select_prompts", gives(3), {"run": RUN, "count": 3}, "returned a int, expected 3 prompt ids"),
    ("prepare_prompts", edit(lambda prompt: prompt.row.update(hint="x")), {}, "column 'hint' was set on 1 of 3"),
    ("prepare_prompts", edit(lambda prompt: prompt.row.pop("raw_prompt")), {}, "'raw_prompt' was set on 2 of 3"),
    ("prepare_prompts", edit(lambda prompt: setattr(prompt, "messages", "ask")), {}, "messages of prompt 1 are 'ask'"),
    ("prepare_prompts", edit(lambda prompt: setattr(prompt, "messages", [])), {}, "messages of prompt 1 are []"),
    ("prepare_prompts", edit(lambda prompt: setattr(prompt, "messages", [{"role": "user"}])), {}, "{'role': 'user'}"),
    ("shape_rewards", gives(torch.zeros(4)), {"run": RUN, "batch": None}, "assign batch.rewards"),
    ("shape_rewards", lambda self, batch: setattr(batch, "rewards", torch.zeros(5)), {"run": RUN}, "shape (5,)"),
    ("shape_rewards", lambda self, batch: setattr(batch, "rewards", wrong_at(2, 1)), {"run": RUN}, "2-1-1_2_0 is nan"),
    ("select_rows", gives(torch.zeros(4)), {"run": RUN, "batch": None}, "call batch.drop or batch.add"),
    ("estimate_advantage", gives(torch.zeros(4)), {"run": RUN}, "shape (4,), expected [rows, tokens] (4, 3)"),
    ("estimate_advantage", gives(np.zeros((4, 3))), {"run": RUN}, "returned a ndarray, expected a tensor"),
    ("estimate_advantage", gives(torch.zeros(4, 3).long()), {"run": RUN}, "torch.int64, expected floating"),
    ("estimate_advantage", gives(wrong_at(3, 2)), {"run": RUN}, "returned nan at token 2 of row 2-1-1_3_0"),
    ("estimate_advantage", gives(wrong_at(1, 0, -math.inf)), {"run": RUN}, "-inf at token 0 of row 1-1-0_1_0"),
    ("policy_loss", gives(torch.zeros(())), {}, "policy_loss returned shape (), expected [rows, tokens] (4, 3)"),
    ("policy_loss", gives(wrong_at(1, 2)), {}, "nan at token 2 of row 1 of micro-batch 2, mini-batch 1, step 7"),
    ("policy_loss", gives(0.0), {}, "returned a float, expected a tensor"),
    ("loss_terms", gives({"a": wrong_at(0, 1, math.inf)}), {}, "loss_terms 'a' returned inf at token 1 of row 0"),
    ("loss_terms", gives({"a": torch.zeros(3)}), {}, "loss_terms 'a' returned shape (3,)"),
    ("loss_terms", gives(torch.zeros(4, 3)), {}, "returned a Tensor, expected a dict"),
    ("loss_terms", gives({3: torch.zeros(4, 3)}), {}, "expected a dict of terms by name"),
    ("shape_logits", gives(1.0), {"logits": torch.zeros(2, 5)}, "returned a float, expected logits (2, 5)"),
    ("shape_logits", gives(torch.zeros(2, 4)), {"logits": torch.zeros(2, 5)}, "shape (2, 4), expected that of the"),
    ("shape_logits", gives(torch.zeros(2, 5).long()), {"logits": torch.zeros(2, 5)}, "torch.int64, expected floating"),
    ("distillation_loss", gives(1.0), {"distilled": TAUGHT}, "returned a float, expected a tensor [tokens] (3,)"),
    ("distillation_loss", gives(torch.zeros(2)), {"distilled": TAUGHT}, "shape (2,), expected [tokens] (3,)"),
    ("distillation_loss", gives(torch.zeros(3).long()), {"distilled": TAUGHT}, "torch.int64, expected floating"),
    ("distillation_loss", gives(torch.tensor([0, NAN, 0])), {"distilled": TAUGHT}, "finite in micro-batch 2, mini"),
    (
        "distillation_loss",
        lambda self, distilled: distilled.teacher_log_probs.zero_().sum(1),
        {"distilled": TAUGHT},
        "wrote into teacher_log_probs",
    ),
    ("optimizer_step", gives("large"), {"actor": None}, "returned a str, expected the norm"),
    ("score_answer", gives(1.0), {"answer": None}, "returned a float, expected a Verdict"),
    ("score_answer", gives(Verdict(NAN, False)), {"answer": None}, "the score nan, expected a finite number"),
    ("score_answer", gives(Verdict(None, False)), {"answer": None}, "the score None"),
    ("score_answer", gives(Verdict("1", True)), {"answer": None}, "the score '1'"),
    ("score_answer", gives(Verdict(1.0, True, {"part": NAN})), {"answer": None}, "part=nan"),
    ("rollout_group", gives_async(["text"]), {"prompt": None, "sample": None}, "expected a list of what sample() gave"),
    ("rollout_group", gives_async([TWICE, TWICE]), {"prompt": None, "sample": None}, "returned a rollout twice"),
    *[
        ("rollout_group", gives_async([in_segments(*places, ids=ids)]), {"prompt": None, "sample": None}, says)
        for places, ids, says in (
            ([(0, 2), (1, 3)], (1, 2, 3), "segment 2 of a response of 3 tokens is 1 to 3; segments follow each other"),
            ([(1, 1), (1, 3)], (1, 2, 3), "only the last may be empty"),
            ([(2, 1)], (1, 2, 3), "follow each other from 0 on"),
            ([(0, 4)], (1, 2, 3, 4), "segment 1 of a response of 3 tokens is 0 to 4"),
            ([(0, 2)], (1, 2, 3), "the last one ends the response"),
            ([(0, 1), (1, 3)], (1, 7, 3), "segment 2 of a response of 3 tokens is 1 to 3, and its rollout has other"),
        )
    ],
]


def does(change: Callable[..., Any], stage: str) -> Callable:
    """An implementation that does this to what it is shown, and gives what its stage may give."""
    given = {"estimate_advantage": torch.zeros(4, 3), "policy_loss": torch.zeros(4, 3)}.get(stage)

    def of_batch(self, batch):
        change(batch)
        return given

    def of_tokens(self, tokens):
        change(tokens)
        return given

    return of_tokens if stage in ("policy_loss", "loss_terms") else of_batch


def zero(name: str) -> Callable[[Any], None]:
    return lambda shown: getattr(shown, name).zero_()


OF_BATCH = ("shape_rewards", "select_rows", "estimate_advantage", "observe")
IN_PLACE = [(stage, name) for name in ("rewards", "scores", "response_mask", "lengths") for stage in OF_BATCH]
IN_PLACE += [(stage, name) for name in ("log_probs", "advantages") for stage in ("policy_loss", "loss_terms")]
CASES += [(stage, does(zero(name), stage), {}, f"{stage} wrote into ") for stage, name in IN_PLACE]
CASES += [
    (stage, does(change, stage), {}, said)
    for stage in ("shape_rewards", "estimate_advantage", "observe")
    for change, said in (
        (lambda batch: batch.drop(torch.arange(4) == 1), f"{stage} called batch.drop, which only select_rows may"),
        (lambda batch: batch.add(0, np.array([1]), reward=1, correct=True), f"{stage} called batch.add, which only"),
        (lambda batch: batch.bring_back([PAST]), f"{stage} called batch.bring_back, which only"),
        (lambda batch: batch.skip_update(), f"{stage} called batch.skip_update, which only"),
    )
]
CASES += [
    (stage, does(lambda batch: setattr(batch, "rewards", torch.ones(4)), stage), {}, "do it in shape_rewards")
    for stage in ("estimate_advantage", "observe")
]
CASES += [
    (
        "observe",
        does(lambda batch, name=name: batch.put(name, torch.ones(4)), "observe"),
        {},
        f"put {name!r}: a field of",
    )
    for name in ("responses", "advantages", "rm_scores", "__truncated__", "verdict")
]
CASES += [
    ("select_rows", does(change, "select_rows"), {}, said)
    for change, said in (
        (lambda batch: batch.drop(torch.tensor([0.0, 0.3, 0.0, 0.0])), "expected one flag per row"),
        (lambda batch: batch.add(0, np.array([0.5]), reward=1, correct=True), "expected token ids"),
        (lambda batch: batch.add(0, np.array([-1]), reward=1, correct=True), "expected token ids"),
    )
]


def arguments(stage: str, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the stage that the case leaves out."""
    makers = {
        "prepare_prompts": lambda: {"run": RUN, "prompts": prompts()},
        "shape_rewards": lambda: {"run": RUN, "batch": batch()},
        "select_rows": lambda: {"run": RUN, "batch": batch()},
        "estimate_advantage": lambda: {"run": RUN, "batch": batch()},
        "observe": lambda: {"run": RUN, "batch": batch()},
        "policy_loss": lambda: {"tokens": tokens()},
        "loss_terms": lambda: {"tokens": tokens()},
        "rollout_group": lambda: {"run": RUN},
    }
    return {**given, **makers.get(stage, dict)()}


@pytest.mark.parametrize(("stage", "function", "given", "said"), CASES, ids=[f"{c[0]}-{c[3][:50]}" for c in CASES])
def test_what_a_plugin_gives(stage: str, function: Callable, given: dict, said: str, sentence: Callable) -> None:
    guilty = plugin("guilty", stage, function)
    others = [plugin(name, stage, gives(None)) for name in ("before", "after")] if stage not in FIRST_RESULT else []
    with pytest.raises(PluginError) as error:
        call(stage, *others[:1], guilty, *others[1:], **arguments(stage, given))
    sentence(error.value, said)
    assert whose(error.value).startswith(f"plugin 'guilty' in {stage}, {__file__}:")


WRAPPED = {
    "estimate_advantage": torch.zeros(4, 3),
    "policy_loss": torch.zeros(4, 3),
    "loss_terms": {"a": torch.zeros(4, 3)},
    "select_prompts": [1, 2, 3],
}
SPOILT = {
    "estimate_advantage": (wrong_at(0, 0), torch.zeros(3, 4), None),
    "policy_loss": (wrong_at(0, 0), torch.zeros(3, 4), None),
    "loss_terms": ([{"a": wrong_at(0, 0)}],),
    "select_prompts": ([1, 1, 3],),
}


@pytest.mark.parametrize(("stage", "value"), [(stage, value) for stage in SPOILT for value in SPOILT[stage]])
def test_a_wrapper_is_blamed_for_what_it_makes_of_a_sound_result(stage: str, value: Any) -> None:
    def spoils(self):
        yield
        return value

    inner = plugin("inner", stage, gives(WRAPPED[stage]))
    members = [plugin("outer", stage, passes_on, wrapper=True), plugin("spoils", stage, spoils, wrapper=True), inner]
    given = {"run": RUN, "count": 3} if stage == "select_prompts" else {"run": RUN}
    given = {"tokens": tokens()} if stage in ("policy_loss", "loss_terms") else arguments(stage, given)
    with pytest.raises(ResultError) as error:
        call(stage, *members, **given)
    assert whose(error.value).startswith(f"plugin 'spoils' in {stage}, {__file__}:{spoils.__code__.co_firstlineno}")


def passes_on(self):
    return (yield)


def test_a_wrapper_is_not_blamed_for_what_it_was_given() -> None:
    inner = plugin("inner", "estimate_advantage", gives(wrong_at(0, 0)))
    with pytest.raises(ResultError) as error:
        call(
            "estimate_advantage",
            plugin("outer", "estimate_advantage", passes_on, wrapper=True),
            inner,
            run=RUN,
            batch=batch(),
        )
    assert "plugin 'inner'" in said_of(error.value)


def test_a_wrapper_of_rollout_group_is_checked_when_its_rollouts_are_there() -> None:
    async def doubled(rollouts):
        return 2 * await rollouts

    def doubles(self):
        return doubled((yield))

    inner = plugin("inner", "rollout_group", gives_async([rollout()]))
    with pytest.raises(ResultError, match="twice") as error:
        call(
            "rollout_group",
            plugin("doubles", "rollout_group", doubles, wrapper=True),
            inner,
            run=RUN,
            prompt=None,
            sample=None,
        )
    assert "plugin 'doubles' in rollout_group" in whose(error.value)


def test_nan_of_one_reward_shaping_is_not_blamed_on_the_estimator() -> None:
    def shape_rewards(self, batch):
        batch.rewards = batch.scores.log() * 0

    plugins = Plugins([plugin("shaping", "shape_rewards", shape_rewards), Grpo(Grpo.Config())], check=outcome.check)
    with pytest.raises(DataError) as error:
        plugins.hook.shape_rewards(run=RUN, batch=batch())
    line = shape_rewards.__code__.co_firstlineno + 1
    assert said_of(error.value).endswith(f"(plugin 'shaping' in shape_rewards, {__file__}:{line})")


@pytest.mark.parametrize("name", ["log_probs", "old_log_probs", "advantages"])
def test_a_loss_that_was_given_nan_is_not_blamed(name: str) -> None:
    def policy_loss(self, tokens):
        return -tokens.advantages * (tokens.log_probs - tokens.old_log_probs)

    loss = plugin("innocent", "policy_loss", policy_loss)
    with pytest.raises(DataError) as error:
        call("policy_loss", loss, tokens=tokens(**{name: wrong_at(2, 1)}))
    assert said_of(error.value).startswith(f"the loss was given {name} with nan at token 1 of row 2")
    assert "innocent" not in said_of(error.value)


def test_sound_results_pass_and_the_uid_is_named_where_the_loss_has_it() -> None:
    assert call("select_prompts", plugin("a", "select_prompts", gives(np.arange(3))), run=RUN, count=3).tolist() == [
        0,
        1,
        2,
    ]
    assert call("policy_loss", plugin("a", "policy_loss", gives(torch.full((4, 3), 3e38))), tokens=tokens()) is not None
    known = tokens(extra=lambda name: {"uid": ["a", "b", "c", "d"]}[name])
    with pytest.raises(ResultError, match="row 1 .*of draw b"):
        call("policy_loss", plugin("a", "policy_loss", gives(wrong_at(1, 0))), tokens=known)
