"""Prompt augmentation: templates, where their parts go, and what is paid for keeping to them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from fakes import FakeRun, FakeTokenizer
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import Batch, CompositionError, DataError
from verl_plugins.composition import manager
from verl_plugins.composition.compose import compose
from verl_plugins.sampling.prompt_augmentation import (
    PromptAugmentation,
    Template,
    format_rewards,
    prompt_tokens,
    read_templates,
    render,
)
from verl_plugins.services import Prompt, Prompts

QUESTION = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "2+2?"}]
PICTURE = {"role": "user", "content": [{"type": "image"}]}
SINGLE = {"multi_turn": {"enable": False}, "agent": {"default_agent_loop": "single_turn_agent"}}


def method(**options) -> PromptAugmentation:
    return PromptAugmentation(PromptAugmentation.Config(**options))


def run_of(step: int = 1, longest: int = 4096) -> FakeRun:
    return FakeRun(step=step, config=OmegaConf.create({"data": {"max_prompt_length": longest}}))


def prompts_of(count: int, messages=QUESTION) -> Prompts:
    return Prompts([Prompt(number, {"raw_prompt": copy.deepcopy(messages)}) for number in range(count)])


def make_batch(texts, names, correct, uid=None) -> Batch:
    tokenizer = FakeTokenizer()
    ids = [torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in texts]
    lengths = torch.tensor([len(row) for row in ids])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    scores = torch.tensor(correct).float()[:, None]
    return Batch.from_tensors(
        uid=uid or [f"{row}-1-0" for row in range(len(texts))],
        rm_scores=torch.zeros(mask.shape).scatter_(1, lengths[:, None] - 1, scores),
        response_mask=mask,
        responses=torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        response_lengths=lengths,
        format_name=list(names),
        tokenizer=tokenizer,
    )


@pytest.fixture
def short(tmp_path):
    """A file of two templates."""
    path = tmp_path / "short.yaml"
    path.write_text('dots:\n  suffix: "!"\n  once: ["."]\nfree:\n  system: Hm\n  prefill: "So "\n')
    return str(path)


class TestTemplates:
    """Files of templates, shipped and others."""

    def test_shipped(self):
        assert len(read_templates(["default"])) == 13
        assert len(read_templates(["deepseek"])) == 34
        found = read_templates(["deepseek", "deepseek_v8"])
        assert {"r1_strict_v8", "r1_strict_v8_teacher", "think_only_v9"} <= set(found)
        assert found["r1_strict_v8"].once[1:] == found["r1_strict_v8_teacher"].once

    @pytest.mark.parametrize("family", ["default", "deepseek", "deepseek_v8"])
    def test_a_prefilled_string_is_not_asked_for_again(self, family):
        for template in read_templates([family]).values():
            assert not template.prefill or template.prefill not in template.once
            assert "\\boxed" in (template.system or "") + template.suffix

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("dots: {sufix: x}", ("short.yaml: dots.sufix", "'suffix'")),
            ("dots: {once: [1]}", ("short.yaml: dots.once",)),
            ("- dots", ("must map names to templates",)),
            ("a: [", ("is not YAML",)),
            ("random: {}", ("'random'", "is taken")),
        ],
    )
    def test_bad_files(self, tmp_path, sentence, text, words):
        (tmp_path / "short.yaml").write_text(text)
        with pytest.raises(CompositionError) as error:
            read_templates([str(tmp_path / "short.yaml")])
        sentence(error.value, *words)

    def test_missing_and_doubled(self, short, sentence):
        with pytest.raises(CompositionError) as error:
            read_templates(["qwen"])
        sentence(error.value, "'qwen'", "deepseek, deepseek_v8, default")
        with pytest.raises(CompositionError) as error:
            read_templates([short, short])
        sentence(error.value, "'dots'", "is taken")


class TestRender:
    """The instruction goes where the template says; the question stays whole."""

    def test_system_replaces_and_suffix_follows(self):
        before = copy.deepcopy(QUESTION)
        assert render(Template(system="Think.", suffix=" Now."), QUESTION) == [
            {"role": "system", "content": "Think."},
            {"role": "user", "content": "2+2? Now."},
        ]
        assert render(Template(), QUESTION) == QUESTION == before

    def test_the_last_question_of_a_conversation(self):
        talk = [*QUESTION, {"role": "assistant", "content": "4"}, {"role": "user", "content": "3+3?"}]
        rendered = render(Template(suffix="!"), talk)
        assert [message["content"] for message in rendered] == ["Be kind.", "2+2?", "4", "3+3?!"]

    def test_what_was_asked_before_need_not_be_text(self):
        talk = [PICTURE, {"role": "assistant", "content": "A cat."}, QUESTION[1]]
        assert render(Template(suffix="!"), talk)[-1]["content"] == "2+2?!"

    @pytest.mark.parametrize("messages", [[PICTURE], [*QUESTION, PICTURE], QUESTION[:1]])
    def test_refused(self, messages, sentence):
        with pytest.raises(DataError) as error:
            render(Template(), messages)
        sentence(error.value, "user message", "plain text")


class TestFormatRewards:
    """The share of strings that occur exactly once."""

    TEMPLATES = {"two": Template(once=("<a>", ".")), "free": Template()}

    @given(st.lists(st.tuples(st.text("<a>. ", max_size=12), st.sampled_from(["two", "free"])), min_size=1), st.data())
    def test_row_by_row(self, rows, data):
        texts, names = map(list, zip(*rows, strict=True))
        expected = [
            (text.count("<a>") == 1) / 2 + (text.count(".") == 1) / 2 if name == "two" else 1 for text, name in rows
        ]
        found = format_rewards(texts, names, self.TEMPLATES)
        assert found.tolist() == expected
        order = data.draw(st.permutations(range(len(rows))))
        again = format_rewards([texts[i] for i in order], [names[i] for i in order], self.TEMPLATES)
        assert again.tolist() == found[order].tolist()

    def test_unknown_name(self, sentence):
        with pytest.raises(DataError) as error:
            format_rewards(["x"], ["three"], self.TEMPLATES)
        sentence(error.value, "'three'")


class TestDraw:
    """One template per draw of a prompt."""

    def test_prompts_are_rendered_and_named(self, short):
        plugin, prompts, run = method(templates=(short,), validation="free"), prompts_of(64), run_of()
        plugin.prepare_prompts(run, prompts)
        for prompt in prompts:
            template = plugin.templates[prompt.row["format_name"]]
            assert (prompt.messages, prompt.prefill) == (render(template, QUESTION), template.prefill)
        share = np.mean([prompt.row["format_name"] == "dots" for prompt in prompts])
        entropy = -share * np.log(share) - (1 - share) * np.log(1 - share)
        assert run.metrics == {"entropy_of_draw": pytest.approx(entropy), "templates_too_long": 0}

    def test_a_step_is_repeated_and_steps_differ(self):
        def names(step):
            prompts = prompts_of(32)
            method().prepare_prompts(run_of(step), prompts)
            return [prompt.row["format_name"] for prompt in prompts]

        assert names(1) == names(1) != names(2)

    def test_what_does_not_fit_is_not_drawn(self, short, sentence):
        plugin, run = (
            method(templates=(short,), validation="free"),
            run_of(longest=len("system: Be kind.\nuser: 2+2?!\n")),
        )
        prompts = prompts_of(20)
        plugin.prepare_prompts(run, prompts)
        assert {prompt.row["format_name"] for prompt in prompts} == {"dots", "free"}
        tight = run_of(longest=len("system: Hm\nuser: 2+2?\nSo "))
        plugin.prepare_prompts(tight, prompts := prompts_of(20))
        assert {prompt.row["format_name"] for prompt in prompts} == {"free"}
        assert 0 < tight.metrics["templates_too_long"] < 20
        with pytest.raises(DataError) as error:
            plugin.prepare_prompts(run_of(longest=9), prompts_of(1))
        sentence(error.value, "prompt 0", "none of 2 templates", "max_prompt_length=9")

    def test_strings_the_tokenizer_hides(self, tmp_path, sentence):
        path = tmp_path / "t.yaml"
        path.write_text('a: {once: ["<x>"]}')
        run = run_of()
        run.tokenizer.decode = lambda ids, skip_special_tokens: "" if skip_special_tokens else "<x>"
        with pytest.raises(DataError) as error:
            method(templates=(str(path),), validation="none").prepare_prompts(run, prompts_of(1))
        sentence(error.value, "'<x>'", "'a'", "special token")

    @pytest.mark.parametrize("name", ["tool_agent", "a_loop"])
    def test_other_agent_loops_are_refused(self, short, sentence, name):
        plugin, prompts = method(templates=(short,), validation="dots"), prompts_of(2)
        prompts[1].row["agent_name"] = name
        for stage in (plugin.prepare_prompts, plugin.prepare_validation):
            with pytest.raises(DataError) as error:
                stage(run_of(), prompts)
            sentence(error.value, "prompt 1", repr(name), "'single_turn_agent'")

    @pytest.mark.parametrize("other", ["ttrl", "siri", "r3"])
    def test_the_format_comes_on_top(self, other):
        for order in ([other, "prompt_augmentation"], ["prompt_augmentation", other]):
            stages = manager.build({name: {} for name in order}).of_stage("shape_rewards")
            assert [name for name, _ in stages] == [other, "prompt_augmentation"]

    @pytest.mark.parametrize(("validation", "kinds"), [("dots", {"dots"}), ("random", {"dots", "free"})])
    def test_validation(self, short, validation, kinds):
        prompts = prompts_of(20)
        method(templates=(short,), validation=validation).prepare_validation(run_of(), prompts)
        assert {prompt.row["format_name"] for prompt in prompts} == kinds

    def test_validation_as_it_is(self):
        prompts = prompts_of(2)
        method(validation="none").prepare_validation(run_of(), prompts)
        assert [prompt.row for prompt in prompts] == [{"raw_prompt": QUESTION}] * 2


def test_the_beginning_of_an_answer_counts_as_prompt():
    """That of the chat template, which the settings may change, and the template's own."""

    class Begins(FakeTokenizer):
        def apply_chat_template(self, messages, add_generation_prompt=False, tokenize=True, who="assistant"):
            return super().apply_chat_template(messages, tokenize=False) + f"{who}: " * add_generation_prompt

    run = run_of()
    run.tokenizer = Begins()
    plain = len("system: Be kind.\nuser: 2+2?\n")
    assert prompt_tokens(run, QUESTION, "So ") == plain + len("assistant: So ")
    run.config.data.apply_chat_template_kwargs = {"who": "me"}
    assert prompt_tokens(run, QUESTION) == plain + len("me: ")


class TestReward:
    """The verifier's reward plus the format's; the verdict stays."""

    def test_added_on_the_last_token(self, short):
        plugin = method(templates=(short,), format_weight=0.5, validation="free")
        batch = make_batch(["4.", "4", "4..", "4"], ["dots", "dots", "dots", "free"], [1, 1, 0, 0])
        plugin.shape_rewards(run_of(), batch)
        assert batch.scores.tolist() == [1.5, 1, 0, 0.5]
        assert batch.rewards[0].tolist() == [0, 0, 1.5, 0]
        assert batch.correct.tolist() == [True, True, False, False]

    def test_comes_on_top_of_a_reward_that_is_not_the_verdict(self, short):
        plugin, run = method(templates=(short,), format_weight=0.5, validation="free"), run_of()
        uid = ["0-1-0", "0-1-0", "1-1-1", "1-1-1"]
        batch = make_batch(["4.", "4", "4", "4"], ["dots", "dots", "free", "free"], [1, 0, 0, 0], uid=uid)
        batch.correct  # noqa: B018  before other plugins shape the rewards
        batch.rewards = torch.tensor([0.25, -2.0, 0.75, 3.0])
        plugin.shape_rewards(run, batch)
        assert batch.scores.tolist() == [0.75, -2, 1.25, 3.5]
        assert batch.correct.tolist() == [True, False, False, False]
        plugin.observe(run, batch)
        assert (run.metrics["acc_mean"], run.metrics["acc/dots"], run.metrics["acc/free"]) == (0.25, 0.5, 0)
        assert run.metrics["format_only_groups"] == 0.5, "the second: one verdict, two rewards"

    def test_a_session_of_several_outputs_is_paid_and_counted_by_its_last(self, short):
        plugin, run = method(templates=(short,), validation="free"), run_of()
        batch = make_batch(["4", "4.", "4.", "4"], ["dots"] * 4, [0, 1, 1, 0], uid=["0-1-0"] * 4)
        batch = Batch.from_tensors(
            uid=batch.uid.tolist(),
            session=[0, 0, 1, 1],
            turn=[0, 1, 0, 1],
            tokenizer=batch._tokenizer,
            **batch._source.fields,
        )
        plugin.shape_rewards(run, batch)
        plugin.observe(run, batch)
        assert batch.scores.tolist() == [2, 2, 0, 0]
        counted = {name: run.metrics[name] for name in ("acc/dots", "format/dots", "count/dots", "length/dots")}
        assert counted == {"acc/dots": 0.5, "format/dots": 0.5, "count/dots": 2, "length/dots": 2.5}

    def test_metrics(self, short):
        plugin, run = method(templates=(short,), validation="free"), run_of()
        texts, names = ["1.", "2", "3", "4"], ["dots", "dots", "free", "free"]
        batch = make_batch(texts, names, [0, 0, 0, 1], uid=["0-1-0", "0-1-0", "1-1-1", "1-1-1"])
        plugin.shape_rewards(run, batch)
        plugin.observe(run, batch)
        assert run.metrics == {
            **{"acc/dots": 0, "acc/free": 0.5, "format/dots": 0.5, "format/free": 1, "count/dots": 2, "count/free": 2},
            **{"length/dots": 2.5, "length/free": 2, "acc_mean": 0.25, "format_mean": 0.75, "format_only_groups": 0.5},
        }

    def test_a_group_that_differs_in_answers_is_not_told_apart_by_format_only(self, short):
        plugin, run = method(templates=(short,), validation="free"), run_of()
        batch = make_batch(["1.", "2"], ["dots", "dots"], [1, 0], uid=["0-1-0", "0-1-0"])
        plugin.shape_rewards(run, batch)
        plugin.observe(run, batch)
        assert run.metrics["format_only_groups"] == 0

    def test_a_group_that_agrees_in_answer_and_format_is_not_told_apart_by_format(self, short):
        plugin, run = method(templates=(short,), validation="free"), run_of()
        batch = make_batch(["1.", "2."], ["dots", "dots"], [0, 0], uid=["0-1-0", "0-1-0"])
        plugin.shape_rewards(run, batch)
        plugin.observe(run, batch)
        assert run.metrics["format_only_groups"] == 0


class TestCheck:
    """What it cannot work with."""

    def test_the_recipe(self):
        config = compose("prompt_augmentation", "cpu").config
        assert config.plugins.prompt_augmentation.format_weight == 1
        assert config.actor_rollout_ref.actor.clip_ratio_high == 0.28

    @pytest.mark.parametrize(
        ("options", "changes", "words"),
        [
            ({"validation": "boxed"}, {}, ("'boxed'", "qwen-math")),
            ({}, {"actor_rollout_ref.rollout.multi_turn.enable": True}, ("single-turn", "multi_turn.enable=false")),
            ({}, {"algorithm.filter_groups.enable": True}, ("filter_groups", "before")),
        ],
    )
    def test_refused(self, sentence, options, changes, words):
        config = OmegaConf.create({"actor_rollout_ref": {"rollout": SINGLE}})
        for key, value in changes.items():
            OmegaConf.update(config, key, value, force_add=True)
        with pytest.raises(CompositionError) as error:
            method(**options).check(config)
        sentence(error.value, *words)
