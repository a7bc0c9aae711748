"""R3's reflection: which prompts are asked once more, what they are shown, and how it is told whether that helps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import FakeDataset, FakeRun, FakeTokenizer
from test_r3 import BUDGET, N, answers, make_run, method, train_step

from verl_plugins import CompositionError
from verl_plugins.sampling.r3 import R3, REFLECTIVE, is_hard
from verl_plugins.services import Prompt, Prompts


class Talks(FakeDataset):
    """Questions behind a system message."""

    def __getitem__(self, prompt_id):
        (question,) = super().__getitem__(prompt_id)["raw_prompt"]
        return {"raw_prompt": [{"role": "system", "content": "Be kind."}, question]}


class Marks(FakeTokenizer):
    """Shows the end of a text unless it is told to skip special tokens."""

    def decode(self, ids, skip_special_tokens=False):
        end = "" if skip_special_tokens else "<end>" * (self.eos_token_id in list(ids))
        return super().decode(ids) + end


class TestReflection:
    """Second draws of prompts that mostly fail."""

    def drawn(self, plugin: R3, run: FakeRun, count: int = 8) -> Prompts:
        prompts = Prompts([Prompt(number, dict(run.dataset[number])) for number in range(count)])
        plugin.prepare_prompts(run, prompts)
        return prompts

    def taught(self, **options) -> R3:
        plugin = method(**options)
        train_step(plugin, make_run(1), {number: [number > 1] * 3 + [False] for number in range(8)})
        return plugin

    def test_hard_prompts_take_the_place_of_others(self):
        plugin, run = self.taught(), make_run(2)
        prompts = self.drawn(plugin, run)
        second = [prompt for prompt in prompts if prompt.row[REFLECTIVE]]
        assert sorted(prompt.id for prompt in second) == [0, 1]
        ids = [prompt.id for prompt in prompts]
        assert ids.count(0) == ids.count(1) == 2 and len(ids) == 8
        assert run.metrics == {"isr_prompts": 2, "isr_hard": 2, "isr_too_long": 0}
        roles = [message["role"] for message in second[0].messages]
        assert roles == ["user", "assistant", "user"]
        shown = second[0].messages[1]["content"]
        assert len(shown) == BUDGET and len(set(shown)) == 1
        plain = next(prompt for prompt in prompts if prompt.id == 0 and not prompt.row[REFLECTIVE])
        assert len(plain.messages) == 1

    def test_not_in_the_first_epoch_and_not_beyond_its_share(self):
        assert self.drawn(self.taught(), run := make_run(1)) and run.metrics["isr_prompts"] == 0
        assert self.drawn(self.taught(reflect_share=0.125), run := make_run(2)) and run.metrics["isr_prompts"] == 1
        assert self.drawn(self.taught(reflect_share=0.0), run := make_run(2)) and run.metrics["isr_prompts"] == 0

    def test_where_all_are_hard_they_give_way_to_each_other(self):
        plugin = method(reflect_share=0.5)
        train_step(plugin, make_run(1), {number: [False] * N for number in range(8)})
        prompts = self.drawn(plugin, run := make_run(2))
        assert (run.metrics["isr_hard"], run.metrics["isr_prompts"]) == (8, 4)
        ids = {again: {p.id for p in prompts if p.row[REFLECTIVE] == again} for again in (0.0, 1.0)}
        assert ids[0.0] == ids[1.0] and len(ids[0.0]) == 4, "each beside its plain group"

    def test_an_epoch_ends_where_no_batch_can_be_filled(self):
        plugin = method()
        train_step(plugin, make_run(1, rows=12), {number: [False] * N for number in range(8)})
        self.drawn(plugin, run := make_run(2, rows=12))
        assert run.metrics["isr_prompts"] > 0

    def test_a_long_failure_is_cut_in_the_middle_or_left_out(self):
        plugin = method()
        long = {"responses": torch.arange(50)[None].repeat(4, 1) + 40, "response_mask": torch.ones(4, 50)}
        long |= {"rm_scores": torch.zeros(4, 50), "rollout_log_probs": torch.zeros(4, 50)}
        long |= {"response_lengths": torch.full((4,), 50)}
        plugin.observe(make_run(1), answers(1, {0: [False] * N}, **long))
        asked = len("user: 0\nassistant: \nuser: \n") + len(plugin.instruction.template)
        run = make_run(2, max_prompt_length=asked + 25)
        second = next(prompt for prompt in self.drawn(plugin, run) if prompt.row[REFLECTIVE])
        whole = "".join(map(chr, range(40, 90)))
        head, tail = second.messages[1]["content"].split(" … ")
        assert whole.startswith(head) and whole.endswith(tail) and len(head) == len(tail) == 10
        for room, shown in ((50, whole), (5 + 8, whole[:4] + " … " + whole[-4:])):  # the dots are 5 tokens
            run = make_run(2, max_prompt_length=asked + room)
            second = next(prompt for prompt in self.drawn(plugin, run) if prompt.row[REFLECTIVE])
            assert second.messages[1]["content"] == shown
        run = make_run(2, max_prompt_length=asked + 5 + 7)
        assert not any(prompt.row[REFLECTIVE] for prompt in self.drawn(plugin, run))
        assert run.metrics["isr_too_long"] == 1

    def test_the_instruction_may_name_the_problem(self, tmp_path):
        file = tmp_path / "wording.yaml"
        file.write_text("instruction: 'Wrong, $$5 off. $problem again'")
        run = make_run(2)
        run.dataset = Talks(8)
        second = next(p for p in self.drawn(self.taught(wording=str(file)), run) if p.row[REFLECTIVE])
        assert second.messages[-1]["content"] == f"Wrong, $5 off. {second.id} again"

    @pytest.mark.parametrize(
        "text", ["other: x", "instruction: ''", "instruction: $solution", "instruction: 3 $", "- x"]
    )
    def test_wording_that_cannot_be_used(self, tmp_path, text):
        file = tmp_path / "wording.yaml"
        file.write_text(text)
        with pytest.raises(CompositionError, match="must be a YAML file with a text `instruction`"):
            method(wording=str(file))

    @pytest.mark.parametrize(("right", "seen", "tau"), [(7, 25, 0.28), (7, 50, 0.14), (14, 25, 0.56), (1, 4, 0.25)])
    def test_a_mean_of_tau_is_not_hard(self, right, seen, tau):
        assert not is_hard(np.array([float(right)]), np.array([float(seen)]), tau, 2)[0]

    def test_prompts_without_a_failure_are_not_hard(self):
        assert is_hard(np.array([0.0, 1, 1]), np.array([0.0, 1, 8]), 1.0, 2).tolist() == [False, False, True]

    def test_special_tokens_of_a_failure_are_not_shown(self):
        plugin, run = method(), make_run(2)
        batch = answers(1, {0: [False] * N})
        batch.responses[:, -1] = FakeTokenizer.eos_token_id
        plugin.observe(make_run(1), batch)
        run.tokenizer = Marks()
        second = next(prompt for prompt in self.drawn(plugin, run) if prompt.row[REFLECTIVE])
        assert len(second.messages[1]["content"]) == BUDGET - 1

    def test_a_dataset_smaller_than_a_batch_has_an_epoch_a_step(self):
        plugin = method()
        train_step(plugin, make_run(1, rows=4), {number: [False] * N for number in range(4)})
        self.drawn(plugin, run := make_run(2, rows=4), 4)
        assert run.metrics["isr_hard"] == 4

    def test_prompts_that_were_never_asked_are_not_hard(self):
        with np.errstate(all="raise"):
            assert not is_hard(np.zeros(1), np.zeros(1), 0.25, 2).any()

    @pytest.mark.parametrize(
        ("reflective", "logged"), [([0, 0, 1, 1], 0.5), ([0, 0, 0, 1], 0.0), ([1, 1, 1, 1], 0.75), ([0] * 4, None)]
    )
    def test_how_often_it_helps(self, reflective, logged):
        flags = torch.tensor(reflective).float()
        method().observe(run := make_run(), answers(1, {0: [True] * 3 + [False]}, **{REFLECTIVE: flags}))
        assert run.metrics.get("isr_success_rate") == logged
