"""The tag in front of a prompt: in training and validation, with images, and prompts without an anchor."""

from __future__ import annotations

import copy

import pytest

from verl_plugins import CompositionError, DataError, Prompt, Prompts
from verl_plugins.sampling.ecr import AnchorTags
from verl_plugins.testing import FakeRun

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1="}]


def tagged(row: dict, stage: str = "prepare_prompts", **config) -> list[dict]:
    prompts = Prompts([Prompt(5, row)])
    getattr(AnchorTags(AnchorTags.Config(**config)), stage)(FakeRun(), prompts)
    return prompts[0].messages


@pytest.mark.parametrize("stage", ["prepare_prompts", "prepare_validation"])
@pytest.mark.parametrize(
    "row", [{"anchor_id": 7}, {"extra_info": {"anchor_id": 7.0}}, {"anchor_id": 7, "extra_info": None}]
)
def test_the_tag_stands_before_what_is_asked(stage: str, row: dict) -> None:
    before = copy.deepcopy(CHAT)
    assert tagged({"raw_prompt": CHAT, **row}, stage) == [CHAT[0], {"role": "user", "content": "<topic_07>\n1+1="}]
    assert before == CHAT, "what is handed over is the dataset's"


def test_a_tag_of_one_s_own_and_long_numbers() -> None:
    found = tagged({"raw_prompt": CHAT, "stratum": 123}, column="stratum", tag="[{anchor}]")
    assert found[1]["content"] == "[123]\n1+1="


def test_images_stay_behind_it() -> None:
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    found = tagged({"raw_prompt": [{"role": "user", "content": parts}], "anchor_id": 0})
    assert found[0]["content"] == [{"type": "text", "text": "<topic_00>\n"}, *parts]


@pytest.mark.parametrize("value", [None, "3", 1.5, -1, True])
def test_what_is_no_anchor_is_named(value: object, sentence) -> None:
    with pytest.raises(DataError) as error:
        tagged({"raw_prompt": CHAT, "anchor_id": value})
    sentence(error.value, "prompt 5", repr(value), "'anchor_id'", "verl-plugins data anchors")


def test_a_prompt_without_a_user_is_named(sentence) -> None:
    with pytest.raises(DataError) as error:
        tagged({"raw_prompt": CHAT[:1], "anchor_id": 1})
    sentence(error.value, "prompt 5", "user")


def test_a_tag_without_a_place_for_the_number_is_refused(sentence) -> None:
    with pytest.raises(CompositionError) as error:
        AnchorTags(AnchorTags.Config(tag="<topic>")).check(None)
    sentence(error.value, "plugins.anchor_tags.tag='<topic>'", "{anchor}")
