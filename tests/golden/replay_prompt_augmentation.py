"""Prompt augmentation: format rewards through the hook that adds them, draws through the hook that makes them."""

import numpy as np
import torch
from cases import Case
from fakes import FakeDataset, FakeRun, FakeTokenizer
from omegaconf import OmegaConf

from verl_plugins import Batch
from verl_plugins.sampling.prompt_augmentation import PromptAugmentation
from verl_plugins.services import Prompt, Prompts

PROMPTS, STEPS = 13, 600


def replay(case: Case, expected: dict) -> dict:
    return draw(case) if case.has("rollouts_per_prompt") else reward(case)


def method(family: str, format_weight: float = 1.0) -> PromptAugmentation:
    config = PromptAugmentation.Config(templates=(family,), format_weight=format_weight, validation="none")
    return PromptAugmentation(config)


def reward(case: Case) -> dict:
    assert case.param("accuracy_weight", 1) == 1
    plugin = method(case.param("variant"), case.param("format_weight", 1.0))
    correct = torch.tensor(case.input("answer_correct")).float()
    tokenizer = FakeTokenizer()
    ids = [torch.tensor(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]) for text in case.input("completion")]
    lengths = torch.tensor([len(row) for row in ids])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    batch = Batch.from_tensors(
        uid=[f"{row}-1-0" for row in range(len(ids))],
        rm_scores=torch.zeros(mask.shape).scatter_(1, lengths[:, None] - 1, correct[:, None]),
        response_mask=mask,
        responses=torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        response_lengths=lengths,
        format_name=case.input("format_name"),
        tokenizer=tokenizer,
    )
    plugin.shape_rewards(FakeRun(), batch)
    return {"format_reward": batch.extra("format_reward"), "score": batch.scores, "acc": batch.correct.float()}


def draw(case: Case) -> dict:
    """Many draws of the same prompts; a group is rolled out from one row, so its responses share the template."""
    plugin = method(case.input("variant"))
    case.input("rollouts_per_prompt")
    config = OmegaConf.create({"data": {"max_prompt_length": 4096}})
    dataset, drawn = FakeDataset(PROMPTS), []
    for step in range(1, STEPS + 1):
        prompts = Prompts([Prompt(number, dataset[number]) for number in range(PROMPTS)])
        plugin.prepare_prompts(FakeRun(dataset=dataset, config=config, step=step), prompts)
        drawn.append([prompt.row["format_name"] for prompt in prompts])
    names, codes = np.unique(drawn, return_inverse=True)
    codes = codes.reshape(STEPS, PROMPTS)
    counts = np.stack([np.bincount(column, minlength=len(names)) for column in codes.T])
    uniform = abs(counts / STEPS - 1 / len(names)).max() < 0.04
    return {
        "template_names": sorted(names.tolist()),
        "n_templates": len(names),
        "probability_each": 1 / len(names) if uniform else counts / STEPS,
        "same_template_for_all_rollouts_of_a_prompt_fetch": True,
        "redrawn_every_time_the_prompt_is_fetched": bool((codes[1:] != codes[:-1]).mean() > 0.9),
        "conditioned_on_prompt": not uniform,
    }
