"""verl's agent loops, made to say whether an answer ended by itself or was cut off, and to cut no prompt.

verl gives a response and no word on how it ended. What can cut it is known in three places: the rollout server, asked
here through a client that listens; the loop, which cuts at `data.max_response_length` and ends conversations with
tools; and, where neither tells, the response's own length and last token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.experimental.agent_loop.tool_agent_loop import AgentState, ToolAgentLoop

from verl_plugins.bridge.gather import ordinary
from verl_plugins.cpu.generation import end_tokens
from verl_plugins.errors import DataError

SINGLE_TURN, TOOLS = "single_turn_agent", "tool_agent"
"""verl's names of its two loops."""
CUT_OFF = "truncated"
"""In an output's extra fields: what the agent loop itself says of its end; it is believed."""
TURN_ENDS = "turn_ends"
"""In an output's extra fields: places of the last generated token of each of the policy's turns."""
CUT, STOPPED = ("length", "aborted", "abort"), ("stop",)
"""Stop reasons that tell how a generation ended; the others (`completed`, none) do not."""


@dataclass(frozen=True)
class Generation:
    """What a rollout server gave for one request."""

    token_ids: list[int]
    cut: bool
    """Whether it was cut off."""


@dataclass(frozen=True)
class Ends:
    """What ends a generation by itself, and how long one can be."""

    eos: frozenset[int]
    ignored: bool
    """`rollout.ignore_eos`"""
    prompt_length: int
    response_length: int
    positions: int | None
    """Of the rollout's model; None where they are not known."""
    decode: Callable[[Sequence[int]], str]

    @classmethod
    def of(cls, rollout: Any, model: Any) -> Ends:
        """Of verl's configurations of the rollout and the model."""
        configs = (model.tokenizer, model.generation_config, model.hf_config)
        return cls(
            eos=end_tokens(*configs),
            ignored=bool(getattr(rollout, "ignore_eos", False)),
            prompt_length=rollout.prompt_length,
            response_length=rollout.response_length,
            positions=rollout.max_model_len or getattr(model.hf_config, "max_position_embeddings", None),
            decode=model.tokenizer.decode,
        )

    def generation(self, output: Any, prompt: int, params: Mapping[str, Any]) -> Generation:
        """Of a server's answer to a prompt of so many tokens, asked with these sampling parameters."""
        ids = list(output.token_ids)
        if output.stop_reason in STOPPED or self._ended(ids, params):
            return Generation(ids, cut=False)
        return Generation(ids, cut=output.stop_reason in CUT or len(ids) >= self._limit(prompt, params))

    def _ended(self, ids: Sequence[int], params: Mapping[str, Any]) -> bool:
        if not ids:
            return False
        eos = frozenset() if params.get("ignore_eos", self.ignored) else self.eos
        if ids[-1] in eos or ids[-1] in (params.get("stop_token_ids") or ()):
            return True
        stops = params.get("stop") or ()
        stops = [stops] if isinstance(stops, str) else stops
        return bool(stops) and any(stop in self.decode(ids) for stop in stops)

    def _limit(self, prompt: int, params: Mapping[str, Any]) -> int:
        """Tokens that a server of verl gives at most."""
        named = [params[name] for name in ("max_tokens", "max_new_tokens") if params.get(name) is not None]
        whole = self.prompt_length + self.response_length
        limit = named[0] if named else min(self.response_length, whole - prompt)
        return max(0, min(limit, (self.positions or whole) - prompt))

    def cut_off(self, output: Any, heard: Sequence[Generation], limit: int) -> bool:
        """Whether something cut a session's output off.

        Args:
            output: verl's AgentLoopOutput.
            heard: the generations of the session, in their order.
            limit: the tokens that were asked for.
        """
        said = output.extra_fields.get(CUT_OFF)
        if said is not None:
            return bool(said)
        ids, mask = output.response_ids, output.response_mask
        full = len(ids) >= self.response_length
        if full and mask and not mask[-1]:
            return True  # the last words are a tool's: the policy had no room for its own
        words = _last_words(ids, mask)
        for generation in reversed(heard):
            if _ends_with(words, generation.token_ids):
                return generation.cut
        for generation in reversed(heard):
            if generation.token_ids[: len(words)] == words:
                return True  # the loop kept a part of it
        return len(ids) >= min(limit, self.response_length) and not self._ended(ids, {})


def _last_words(ids: Sequence[int], mask: Sequence[int]) -> list[int]:
    """The policy's last tokens, up to what stands before them or to the response's beginning."""
    end = next((place + 1 for place in reversed(range(len(mask))) if mask[place]), 0)
    start = next((place + 1 for place in reversed(range(end)) if not mask[place]), 0)
    return list(ids[start:end])


def _ends_with(words: Sequence[int], ids: Sequence[int]) -> bool:
    return len(words) >= len(ids) and list(words[len(words) - len(ids) :]) == list(ids) and bool(words) == bool(ids)


_HEARD: ContextVar[list[Generation] | None] = ContextVar("generations of this session", default=None)


def listen() -> None:
    """From here on, in this task and in those it starts, what the rollout servers answer is heard."""
    _HEARD.set([])


def heard() -> list[Generation]:
    """What the rollout servers answered since this task began to listen."""
    return _HEARD.get() or []


class Listening:
    """verl's client of the rollout servers; what they answer is heard by the session that asked."""

    def __init__(self, client: Any, ends: Ends) -> None:
        self._client, self._ends = client, ends

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def generate(self, request_id: str, **request: Any) -> Any:
        """See verl's LLMServerClient."""
        output = await self._client.generate(request_id, **request)
        noted = _HEARD.get()
        if noted is not None:
            noted.append(self._ends.generation(output, len(request["prompt_ids"]), request["sampling_params"]))
        return output


def refuse_long_prompts() -> None:
    """In this process, a loop refuses a prompt that verl would cut at its beginning: whoever wrote the loop."""
    AgentLoopBase._cap_text_prompt_length = _within


def _within(self: AgentLoopBase, prompt_ids: list[int]) -> list[int]:
    limit = self.rollout_config.prompt_length
    if len(prompt_ids) > limit:
        raise DataError(
            f"the prompt has {len(prompt_ids)} tokens as it is asked, data.max_prompt_length is {limit}, and none are "
            f"cut off: set data.max_prompt_length={len(prompt_ids)} or more"
        )
    return prompt_ids


@register(SINGLE_TURN)
class SingleTurn(SingleTurnAgentLoop):
    """verl's single-turn loop, with a text of the prompt's own behind the prompt, or the beginning of a response."""

    prefill = ""
    prefix: Sequence[int] = ()

    async def ct_build_initial_tokens(self, *args: Any, **kwargs: Any) -> list[int]:
        ids = await super().ct_build_initial_tokens(*args, **kwargs)
        if self.prefill:
            begun = self.tokenizer(self.prefill, add_special_tokens=False)["input_ids"]
            ids = self._cap_text_prompt_length(ids + begun)
        return [*ids, *self.prefix]

    async def run(self, *args: Any, **kwargs: Any) -> Any:
        """What is continued belongs to the response, as tokens that the policy did not generate now."""
        output = await super().run(*args, **kwargs)
        if self.prefix:
            count = len(self.prefix)
            output.prompt_ids = output.prompt_ids[:-count]
            output.response_ids = [*self.prefix, *output.response_ids]
            output.response_mask = [0] * count + output.response_mask
            if output.response_logprobs:
                output.response_logprobs = [0.0] * count + output.response_logprobs
        return output


@register(TOOLS)
class ToolLoop(ToolAgentLoop):
    """verl's loop with tools; a conversation that ends while the policy waits for a tool was cut off."""

    async def run(self, *args: Any, **kwargs: Any) -> Any:
        output = await super().run(*args, **kwargs)
        if not output.response_mask:
            output.response_ids = []  # verl takes the last 0 tokens of the prompt, which are all of them
        ends = output.extra_fields.pop(TURN_ENDS, [])
        output.extra_fields[TURN_ENDS] = sorted({min(end, len(output.response_mask) - 1) for end in ends})
        return output

    async def _call_tool(self, *args: Any, **kwargs: Any) -> Any:
        """verl calls several at once, each in a task of its own: what would end the event loop ends the session."""
        try:
            return await super()._call_tool(*args, **kwargs)
        except Exception:
            raise
        except BaseException as error:
            raise ordinary(error) from error

    async def _handle_generating_state(self, agent_data: Any, *args: Any, **kwargs: Any) -> AgentState:
        state = await super()._handle_generating_state(agent_data, *args, **kwargs)
        if agent_data.response_mask:
            agent_data.extra_fields.setdefault(TURN_ENDS, []).append(len(agent_data.response_mask) - 1)
        if state is AgentState.TERMINATED and await self._asks_for_tools(agent_data):
            agent_data.extra_fields[CUT_OFF] = True
        return state

    async def _asks_for_tools(self, agent_data: Any) -> bool:
        """verl looks only where a conversation may go on: not at the limits of turns and of length."""
        tools = [tool.tool_schema for tool in agent_data._active_tools.values()]
        _, calls = await self.tool_parser.extract_tool_calls(agent_data.response_ids, tools)
        return bool(calls)

    async def _handle_processing_tools_state(self, agent_data: Any) -> AgentState:
        state = await super()._handle_processing_tools_state(agent_data)
        if state is AgentState.TERMINATED:
            agent_data.extra_fields[CUT_OFF] = True  # the tool's answer did not fit
        return state
