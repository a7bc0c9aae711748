"""My method: a sentence at the end of every validation question.

The last message of the prompt gets a space and the sentence. Training questions stay as they are: the stage
`prepare_prompts` would change them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from verl_plugins import Plugin, Prompts, Run, hookimpl, setting

Messages = Sequence[dict[str, str]]


def with_sentence(messages: Messages, sentence: str) -> list[dict[str, str]]:
    """New messages; those given stay as they are."""
    *before, last = messages
    return [*before, {**last, "content": f"{last['content']} {sentence}"}]


class MyMethod(Plugin):
    """Longer questions."""

    name = "my_method"

    @dataclass
    class Config:
        sentence: str = setting("Think step by step.", "what stands at the end")

    @hookimpl
    def prepare_validation(self, run: Run, prompts: Prompts) -> None:
        for prompt in prompts:
            prompt.messages = with_sentence(prompt.messages, self.config.sentence)
