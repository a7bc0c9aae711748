"""The line with exploration and progress: where it stands, what it says, at validation as at the end."""

from __future__ import annotations

import copy

import pytest
from omegaconf import OmegaConf

from verl_plugins import CompositionError, DataError, Prompt, Prompts
from verl_plugins.composition.compose import changeable, verl_config
from verl_plugins.sampling.state_augmentation import StateAugmentation, exploration, tenth
from verl_plugins.testing import FakeRun

CHAT = [{"role": "system", "content": "You plan."}, {"role": "user", "content": "1+1="}]
IMAGE = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]}]


def run(step: int, temperature: float = 1.0) -> FakeRun:
    config = {"actor_rollout_ref": {"rollout": {"temperature": temperature}}, "trainer": {"total_training_steps": 40}}
    return FakeRun(step=step, config=OmegaConf.create(config))


def said(step: int, messages=CHAT, temperature: float = 1.0, validation: bool = False, **config) -> list[dict]:
    plugin, prompts = (
        StateAugmentation(StateAugmentation.Config(**config)),
        Prompts([Prompt(3, {"raw_prompt": messages})]),
    )
    (plugin.prepare_validation if validation else plugin.prepare_prompts)(run(step, temperature), prompts)
    return prompts[0].messages


@pytest.mark.parametrize(
    ("step", "steps", "part"),
    [(1, 40, 1), (4, 40, 1), (5, 40, 2), (36, 40, 9), (37, 40, 10), (40, 40, 10), (41, 40, 10), (0, 40, 1), (1, 1, 1)],
)
def test_tenths(step: int, steps: int, part: int) -> None:
    assert tenth(step, steps) == part


@pytest.mark.parametrize(("temperature", "word"), [(0.0, "low"), (0.5, "medium"), (0.89, "medium"), (0.9, "high")])
def test_words(temperature: float, word: str) -> None:
    assert exploration(temperature, 0.5, 0.9) == word


def test_the_system_message_gets_the_line() -> None:
    before = copy.deepcopy(CHAT)
    assert said(9) == [{"role": "system", "content": "You plan.\n[explore=high step=3/10]"}, CHAT[1]]
    assert before == CHAT, "what is handed over is the dataset's"


def test_the_last_message_of_the_user_can_get_it() -> None:
    several = [*CHAT, {"role": "assistant", "content": "2"}, {"role": "user", "content": "sure?"}]
    found = said(9, several, 0.3, place="user")
    assert found == [*several[:3], {"role": "user", "content": "sure?\n[explore=low step=3/10]"}]


def test_images_stay_where_they_are() -> None:
    found = said(1, IMAGE, place="user")
    assert found[0]["content"] == [*IMAGE[0]["content"], {"type": "text", "text": "\n[explore=high step=1/10]"}]


@pytest.mark.parametrize("step", [0, 1, 20])
def test_validation_has_the_values_of_the_end(step: int) -> None:
    assert said(step, validation=True)[0]["content"].endswith("[explore=high step=10/10]")


def test_steps_of_its_own() -> None:
    assert said(9, steps=18)[0]["content"].endswith("step=5/10]")


def test_the_tenth_is_logged() -> None:
    told = run(40)
    StateAugmentation(StateAugmentation.Config()).prepare_prompts(told, Prompts([Prompt(0, {"raw_prompt": CHAT})]))
    assert told.metrics == {"tenth": 10}


def test_a_prompt_without_the_message_is_named(sentence) -> None:
    with pytest.raises(DataError) as error:
        said(1, CHAT[1:])
    sentence(error.value, "prompt 3", "'system'", "plugins.state_augmentation.place")


def test_settings_that_cannot_be_honoured(sentence) -> None:
    config = changeable(verl_config())
    config.trainer.total_training_steps = None
    with pytest.raises(CompositionError) as error:
        StateAugmentation(StateAugmentation.Config()).check(config)
    sentence(error.value, "trainer.total_training_steps", "plugins.state_augmentation.steps")
    StateAugmentation(StateAugmentation.Config(steps=3)).check(config)
    with pytest.raises(CompositionError) as error:
        StateAugmentation(StateAugmentation.Config(low=1.0, steps=3)).check(config)
    sentence(error.value, "plugins.state_augmentation.low=1.0", "0.9")
