"""Anchor tags: the prompt says in text which semantic anchor it is near.

arXiv:2601.00543, as far as it could be known (abstract and a third-party summary; no code): control tokens made from
fixed anchors stand before the input of a small model, in training and afterwards, so that it keeps the regions of its
teacher's embedding space apart. Neither logits nor hidden states are matched and there is no loss term. Inferred: which
tokens; here it is text, so that no vocabulary grows. The paper trains on a teacher's outputs, not by RL; the use in RL
is ours.

    <topic_07>
    What is 17 + 5?

`verl-plugins data anchors` writes each prompt's anchor into a column of the data.

Against GRPO: (1) the tag in front of the prompt, in training and in validation; nothing else.

Degenerate cases: a prompt without anchor is refused. Images are not looked at: the tag stands before what the message
has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from verl_plugins import CompositionError, DataError, Plugin, Prompt, Prompts, Run, hookimpl, setting

NUMBER = "{anchor}"
"""Where the anchor's number stands in a tag."""


class AnchorTags(Plugin):
    """Puts a text tag for the anchor in front of prompts."""

    name = "anchor_tags"
    paper = "arXiv:2601.00543"

    @dataclass
    class Config:
        column: str = setting("anchor_id", "column of the dataset, or key of its extra_info, with the prompt's anchor")
        tag: str = setting(
            "<topic_{anchor}>", "the line that stands in front; {anchor} becomes the number, two digits long"
        )

    def check(self, config: DictConfig) -> None:
        if NUMBER not in self.config.tag:
            raise CompositionError(
                f"plugins.anchor_tags.tag={self.config.tag!r} would be the same for all anchors: write {NUMBER} where "
                "the number is to stand"
            )

    @hookimpl
    def prepare_prompts(self, run: Run, prompts: Prompts) -> None:
        self._tag(prompts)

    @hookimpl
    def prepare_validation(self, run: Run, prompts: Prompts) -> None:
        self._tag(prompts)

    def _tag(self, prompts: Prompts) -> None:
        for prompt in prompts:
            tag = self.config.tag.replace(NUMBER, f"{anchor_of(prompt, self.config.column):02d}") + "\n"
            messages = list(prompt.messages)
            place = next((k for k, message in enumerate(messages) if message["role"] == "user"), None)
            if place is None:
                raise DataError(f"anchor_tags: prompt {prompt.id} has no message of a user's to put a tag in front of")
            messages[place] = tagged(messages[place], tag)
            prompt.messages = messages


def anchor_of(prompt: Prompt, column: str) -> int:
    """The number of a prompt's anchor.

    Raises:
        DataError: it has none.
    """
    found = prompt.row.get(column, (prompt.row.get("extra_info") or {}).get(column))
    if found is None or isinstance(found, (bool, str)) or int(found) != found or found < 0:
        raise DataError(
            f"prompt {prompt.id} has {found!r} in the column {column!r}, expected the number of an anchor; "
            "verl-plugins data anchors FILE --to OUT writes that column, of validation data with --val"
        )
    return int(found)


def tagged(message: Mapping[str, Any], tag: str) -> dict[str, Any]:
    """A message with the tag before what it has, be that text or parts with images among them."""
    content = message["content"]
    longer = tag + content if isinstance(content, str) else [{"type": "text", "text": tag}, *content]
    return {**message, "content": longer}
