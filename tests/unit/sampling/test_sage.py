"""SAGE: hints read from answers, groups that escalate, levels that are remembered."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
import torch
from fakes import FakeDataset, FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_vade import make_batch

from verl_plugins import Batch, CompositionError, DataError, StateError
from verl_plugins.composition import manager
from verl_plugins.sampling.sage import WORD, Sage, hint_text, next_level, parse_hint, question_of, with_hint
from verl_plugins.services import Generated, Prompt, Prompts, Rollout

READABLE = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1)
HINTS = {"level_1": "key", "level_2": "way", "level_3": "detail"}
ANSWER = json.dumps(HINTS)
ROW = {
    "raw_prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "2+2?"}],
    "reward_model": {"ground_truth": "4"},
    "extra_info": {"solution": "2 and 2 are 4"},
}


def method(**options) -> Sage:
    return Sage(Sage.Config(**options))


class Worker:
    """An agent-loop worker: answers to requests in turn, rewards of each group in turn."""

    def __init__(self, answers=(), groups=(), longest=4096):
        self.run = FakeRun(
            config=OmegaConf.create({"data": {"max_prompt_length": longest, "max_response_length": 4096}})
        )
        self.run.generate = self.generate
        self.answers, self.groups = list(answers), list(groups)
        self.requests, self.asked = [], []

    async def generate(self, messages, n=1, temperature=None, max_tokens=None):
        self.requests.append((messages, temperature, max_tokens))
        return [Generated([1, 2, 3], [], self.answers.pop(0))]

    async def sample(self, n=None, *, messages=None):
        self.asked.append(messages and messages[-1]["content"])
        return [Rollout("", [], float(right), bool(right), False, {}, len(self.asked)) for right in self.groups.pop(0)]


def play(plugin: Sage, worker: Worker, **row) -> tuple[Prompt, list[Rollout]]:
    prompt = Prompt(0, {**ROW, "hint_level": 0, "hint_used": 0, "hint_question": "2+2?", "hints": "", **row})
    return prompt, asyncio.run(plugin.rollout_group(worker.run, prompt, worker.sample))


class TestParse:
    """An object with a text, wherever it stands."""

    @pytest.mark.parametrize(
        "answer",
        [
            f"Set {{x}} = 1 and \\frac{{1}}{{2}}. {ANSWER} I hope that helps {{a}}.",
            f"```json\n{ANSWER}\n```",
            json.dumps({"hints": HINTS}),
            "{level_1: 'key', 'level_2': 'way', level_3: \"detail\",} // done",
        ],
    )
    def test_found(self, answer):
        assert parse_hint(answer) == HINTS

    def test_line_breaks_and_backslashes(self):
        assert parse_hint('{"level_1": "first\nsecond"}') == {"level_1": "first\nsecond"}

    @pytest.mark.parametrize(
        ("written", "read"),
        [
            (r"\\(x\\)", r"\(x\)"),
            (r"\(x\)", r"\(x\)"),
            (r"\frac{1}{2} \theta \beta \rho \sqrt 2", r"\frac{1}{2} \theta \beta \rho \sqrt 2"),
            (r"\neq \nabla \not= \notin \underline x", r"\neq \nabla \not= \notin \underline x"),
            (r"a\\times b", r"a\times b"),
            (r"first\nsecond\n\tThird \"x\" \u00e9", 'first\nsecond\n\tThird "x" é'),
        ],
    )
    def test_latex(self, written, read):
        assert parse_hint(f'{{"level_1": "{written}"}}') == {"level_1": read}

    def test_reasoning_is_not_the_answer(self):
        echo = '{"level_1": "...", "level_2": "..."}'
        assert parse_hint(f"<think>They want {echo}, so {{'level_1': 'no'}}</think>{ANSWER}") == HINTS
        assert parse_hint(f"The format is {echo}. {ANSWER}") == HINTS
        assert parse_hint(f"<think>{ANSWER}</think> I cannot.") is None

    @pytest.mark.parametrize(
        "answer",
        [
            "",
            "no",
            "[1]",
            "7",
            "{}",
            '{"level_1": "  "}',
            '{"level_1": "..."}',
            '{"level_1": "look \\ud83d here"}',
            '{"level_1": 3}',
            '{"level_0": "x"}',
            '{"level_4": "x"}',
            '{"level_1": "a',
        ],
    )
    def test_failed(self, answer):
        assert parse_hint(answer) is None

    @given(st.text("{}[]\"'\\,: ab1\nud8"))
    def test_nothing_breaks_it(self, answer):
        found = parse_hint(answer)
        assert found is None or isinstance(found, dict)

    @pytest.mark.parametrize("piece", ["{", "[", '{"a":', "{'a':["])
    def test_deep_nesting(self, piece):
        assert parse_hint(piece * 3000) is None

    @given(st.dictionaries(st.sampled_from(sorted(HINTS)), READABLE.filter(WORD.search), min_size=1))
    def test_round_trip(self, payload):
        assert parse_hint(f"Sure: {json.dumps(payload)}.") == payload
        assert all(hint_text(payload, int(name[-1])) == text for name, text in payload.items())


class TestNextLevel:
    """sage-light's rule."""

    @given(st.lists(st.tuples(st.integers(-1, 3), st.floats(0, 1)), min_size=1), st.floats(0, 1), st.floats(0, 1))
    def test_prompt_by_prompt(self, visits, one, other):
        level, accuracy = (np.array(column) for column in zip(*visits, strict=True))
        low, high = sorted((one, other))
        for found, (before, right) in zip(next_level(level, accuracy, 3, one, other), visits, strict=True):
            up, down = right <= low, right > high and right > low
            assert found == (0 if before < 0 else min(max(before + up - down, 0), 3))


class TestSage:
    """Escalation within a step."""

    def test_a_solved_group_is_left_alone(self):
        worker = Worker(groups=[[0, 1]])
        prompt, rollouts = play(method(), worker)
        assert (worker.requests, worker.asked, prompt.row["hint_used"]) == ([], [None], 0)
        assert worker.run.metrics == {"needing_hint": False}
        assert [rollout.outputs for rollout in rollouts] == [1, 1]

    def test_until_one_is_right(self):
        worker = Worker([ANSWER], [[0, 0], [0, 0], [1, 0]])
        prompt, rollouts = play(method(hint_max_tokens=50), worker)
        hint = "2+2?\n\nA hint that may help you:\n"
        assert worker.asked == [None, f"{hint}key", f"{hint}way"]
        assert prompt.row["hint_used"] == 2
        assert [rollout.outputs for rollout in rollouts] == [3, 3], "the last group replaces the others whole"
        assert prompt.messages == ROW["raw_prompt"], "the plain prompt stays what it was"
        (messages, temperature, limit), *_ = worker.requests
        assert (temperature, limit) == (1.0, 50)
        assert "2+2?" in messages[1]["content"] and "2 and 2 are 4" in messages[1]["content"]
        assert worker.run.metrics == {
            **{"needing_hint": True, "rescued": True, "still_unsolved": False, "extra_rollouts": 4, "hint_too_long": 0},
            **{"hint_attempts": 1, "hint_parse_failed": False, "hint_tokens_mean": 3, "answer_leak": False},
            "hint_request_too_long": False,
        }

    def test_retries_and_gives_up(self):
        worker = Worker(["no", "{", ANSWER], [[0], [1]])
        assert play(method(), worker)[0].row["hint_used"] == 1
        assert worker.run.metrics["hint_attempts"] == 3
        worker = Worker(["no"] * 2, [[0]])
        prompt, rollouts = play(method(hint_attempts=2), worker)
        assert (len(rollouts), prompt.row["hint_used"]) == (1, 0)
        assert worker.run.metrics["hint_parse_failed"] and worker.run.metrics["still_unsolved"]

    def test_sessions_that_failed(self):
        worker = Worker([ANSWER], [[0], [], [], []])
        assert [rollout.outputs for rollout in play(method(), worker)[1]] == [1]
        worker = Worker(groups=[[]])
        assert play(method(), worker)[1] == []

    def test_level_0_asks_for_nothing(self):
        worker = Worker(groups=[[0]])
        assert play(method(max_level=0), worker)[0].row["hint_used"] == 0
        assert worker.requests == [] and worker.run.metrics["still_unsolved"]

    def test_the_request_has_the_question_of_the_dataset(self):
        prompts = Prompts([Prompt(0, {**ROW, "raw_prompt": [{"role": "user", "content": "3+3?"}]})])
        plugin, run = method(), FakeRun(dataset=FakeDataset(1))
        plugin.prepare_prompts(run, prompts)
        prompts[0].messages = [{"role": "user", "content": "Once more."}]
        worker = Worker([ANSWER], [[0], [1]])
        asyncio.run(plugin.rollout_group(worker.run, prompts[0], worker.sample))
        assert "3+3?" in worker.requests[0][0][1]["content"] and worker.asked[1].startswith("Once more.")
        for recipes in ({"r3": {}, "sage": {}, "grpo": {}}, {"prompt_augmentation": {}, "sage": {}, "grpo": {}}):
            assert manager.build(recipes).of_stage("prepare_prompts")[0][0] == "sage"

    def test_a_hint_that_does_not_fit(self):
        hints = json.dumps({**HINTS, "level_1": "long " * 900})
        worker = Worker([hints], [[0], [1]])
        assert play(method(), worker)[0].row["hint_used"] == 2
        assert worker.run.metrics["hint_too_long"] == 1

    def test_a_request_that_does_not_fit(self):
        worker = Worker(groups=[[0]])
        play(method(), worker, extra_info={"solution": "so " * 9000})
        assert worker.requests == []
        assert worker.run.metrics["hint_request_too_long"]

    @pytest.mark.parametrize(("hint", "leak"), [("it is 4!", True), ("look at 14 and 40", False)])
    def test_leak(self, hint, leak):
        worker = Worker([json.dumps({"level_3": hint})], [[0], [1]])
        play(method(), worker)
        assert worker.run.metrics["answer_leak"] == leak

    @pytest.mark.parametrize(("rewards", "leak"), [([[0], [1]], False), ([[0], [0], [1]], True)])
    def test_only_hints_that_were_shown_can_leak(self, rewards, leak):
        worker = Worker([json.dumps({"level_1": "add them", "level_2": "it is 4"})], rewards)
        prompt, _ = play(method(), worker)
        assert prompt.row["hint_used"] == len(rewards) - 1
        assert worker.run.metrics["answer_leak"] == leak
        longest = 800
        worker = Worker([json.dumps({"level_1": "4 " * longest, "level_2": "add them"})], [[0], [1]], longest)
        assert play(method(), worker)[0].row["hint_used"] == 2
        assert not worker.run.metrics["answer_leak"]
        worker = Worker(["no"] * 3, [[0]])
        play(method(), worker)
        assert "answer_leak" not in worker.run.metrics


class TestLight:
    """One rollout, at the level of the visit."""

    @pytest.mark.parametrize(("level", "leak"), [(1, False), (2, True), (3, False)])
    def test_the_hint_that_is_shown_may_leak(self, level, leak):
        worker = Worker([json.dumps({"level_1": "add", "level_2": "it is 4", "level_3": "count"})], [[0]])
        play(method(variant="sage-light"), worker, hint_level=level)
        assert worker.run.metrics["answer_leak"] == leak

    def test_fresh_hints_else_the_last_ones_else_none(self):
        plugin = method(variant="sage-light", hint_attempts=1)
        worker = Worker([ANSWER], [[0]])
        prompt, _ = play(plugin, worker, hint_level=2)
        assert worker.asked[0].endswith("way")
        assert (prompt.row["hint_used"], json.loads(prompt.row["hints"])) == (2, HINTS)
        worker = Worker(["no"], [[0]])
        prompt, _ = play(plugin, worker, hint_level=2, hints=json.dumps({"level_2": "old"}))
        assert worker.asked[0].endswith("old")
        assert worker.run.metrics["hint_fallback"]
        worker = Worker(["no"], [[0]])
        prompt, _ = play(plugin, worker, hint_level=2)
        assert (worker.asked, prompt.row["hint_used"]) == ([None], 0)

    @pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
    def test_the_last_of_two_draws_counts(self, order):
        plugin = method(variant="sage-light")
        fields = {"uid": ["0-9-5", "0-9-5", "0-10-2", "0-10-2"], "hint_used": [1, 1, 0, 0]}
        fields |= {"rm_scores": [[1.0], [1.0], [0.0], [0.0]], "hints": ["{}", "{}", ANSWER, ANSWER]}
        shuffled = {name: [values[place] for place in order] for name, values in fields.items()}
        scores = torch.tensor(shuffled.pop("rm_scores"))
        plugin.observe(
            FakeRun(dataset=FakeDataset(1)),
            Batch.from_tensors(rm_scores=scores, response_mask=torch.ones_like(scores), **shuffled),
        )
        assert (plugin.level[0], plugin.accuracy[0], plugin.hints["0"]) == (0, 0, ANSWER)
        assert (plugin.right[0], plugin.asked[0]) == (2, 4)

    def test_from_visit_to_visit(self):
        plugin, run = method(variant="sage-light"), FakeRun(dataset=FakeDataset(3))
        prompts = Prompts([Prompt(number, dict(ROW)) for number in range(2)])

        def visit():
            plugin.prepare_prompts(run, prompts)
            return [prompt.row["hint_level"] for prompt in prompts]

        assert visit() == [0, 0]
        for used, outcomes, expected in (([0, 0], ([0.0], [1.0]), [1, 0]), ([1, 0], ([0.0], [0.0]), [2, 1])):
            batch = make_batch(*enumerate(map(list, outcomes)), hint_used=used, hints=[ANSWER, ""])
            plugin.observe(run, batch)
            assert visit() == expected
        assert [prompt.row["hints"] for prompt in prompts] == [ANSWER, ""]
        assert run.metrics["level_0"] == run.metrics["level_1"] == 0.5
        assert (run.metrics["acc_level_1"], run.metrics["mean_reward_bucket_0"]) == (0, 0.5)
        other = method(variant="sage-light")
        other.load_state_dict(plugin.state_dict())
        plugin = other
        assert visit() == [2, 1]
        with pytest.raises(StateError):
            other.prepare_prompts(FakeRun(dataset=FakeDataset(4)), prompts)

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 8)), min_size=1, max_size=8))
    def test_buckets(self, outcomes):
        outcomes = [(min(right, n), n) for right, n in outcomes]
        plugin, run = method(), FakeRun(dataset=FakeDataset(9))
        batch = make_batch(
            *[(k, [1.0] * right + [0.0] * (n - right)) for k, (right, n) in enumerate(outcomes)],
            hint_used=[0] * sum(n for _, n in outcomes),
        )
        plugin.observe(run, batch)
        shares = [run.metrics[f"mean_reward_bucket_{k}"] for k in range(7)]
        assert sum(shares) == pytest.approx(1)
        assert shares[0] == pytest.approx(np.mean([right == 0 for right, _ in outcomes]))
        assert shares[6] == pytest.approx(np.mean([right == n for right, n in outcomes]))


class TestPrompts:
    """What is made of a prompt, and which are refused."""

    def test_the_hint_is_for_the_last_question_and_all_else_stays(self):
        """Pictures beside its text, and what was said before and after it."""
        parts = [{"type": "image"}, {"type": "text", "text": "What"}, {"type": "text", "text": "is it?"}]
        before = [{"role": "user", "content": "Look."}, {"role": "assistant", "content": "Yes."}]
        question, after = {"role": "user", "content": parts}, {"role": "assistant", "content": "It"}
        assert question_of([*before, question, after]) == "What\nis it?"
        hinted = {"role": "user", "content": [*parts, {"type": "text", "text": "look"}]}
        assert with_hint([*before, question, after], "look") == [*before, hinted, after]

    def test_without_a_solution(self, sentence):
        run, prompts = FakeRun(dataset=FakeDataset(1)), Prompts([Prompt(0, {**ROW, "extra_info": {}})])
        with pytest.raises(DataError) as error:
            method().prepare_prompts(run, prompts)
        sentence(error.value, "prompt 0", "solution", "answer_as_solution=true")
        plugin = method(answer_as_solution=True)
        plugin.prepare_prompts(run, prompts)
        assert plugin._solution(prompts[0]) == "4"

    @pytest.mark.parametrize(
        "text",
        [
            "tutor: a",
            "{tutor: a, request: $problem, hint: $hint}",
            "- a",
            "{tutor: 3 $, request: $problem $solution, hint: $hint}",
        ],
    )
    def test_wording(self, tmp_path, sentence, text):
        path = tmp_path / "words.yaml"
        path.write_text("{tutor: a, request: '${problem} $solution', hint: b $$ $hint}")
        assert method(wording=str(path))._hinted(Prompt(0, ROW), "c")[-1]["content"] == "2+2?b $ c"
        path.write_text(text)
        with pytest.raises(CompositionError) as error:
            method(wording=str(path)).check(OmegaConf.create({}))
        sentence(error.value, "plugins.sage.wording", "words.yaml", "$solution")

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"algorithm": {"filter_groups": {"enable": True}}}, ("filter_groups.enable=false",)),
            ({"reward": {"reward_model": {"enable": True, "enable_resource_pool": False}}}, ("enable_resource_pool",)),
            ({"data": {"max_response_length": 512}}, ("hint_max_tokens=1024", "max_response_length=512")),
        ],
    )
    def test_refused(self, sentence, config, words):
        with pytest.raises(CompositionError) as error:
            method().check(OmegaConf.merge({"data": {"max_prompt_length": 512, "max_response_length": 2048}}, config))
        sentence(error.value, "plugins.sage", *words)

    @pytest.mark.parametrize(
        "config",
        [
            {"data": {"max_prompt_length": 512, "max_response_length": 513}},
            {"reward": {"reward_model": {"enable": False, "enable_resource_pool": False}}},
            {"reward": {"reward_model": {"enable": True, "enable_resource_pool": True}}},
        ],
    )
    def test_accepted(self, config):
        method().check(OmegaConf.merge({"data": {"max_prompt_length": 512, "max_response_length": 2048}}, config))
