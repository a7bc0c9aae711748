"""A response published as several rows: each has its own tokens, and what stands before them as its prompt."""

from __future__ import annotations

from typing import Any

from verl_plugins.bridge.group import Session
from verl_plugins.bridge.loops import CUT_OFF
from verl_plugins.bridge.rows import MAX_TOKENS, OFFSET
from verl_plugins.errors import DataError
from verl_plugins.services import Rollout, Segment


def in_rows(rollout: Rollout, limit: int) -> Session:
    """The session with an output for each row, which have the rollout's fields, and of a segment its own.

    Args:
        rollout: as `sample` gave it, with what a plugin has put into it.
        limit: tokens that a response could have.

    Raises:
        DataError: a segment is of a conversation of several outputs.
    """
    session: Session = rollout.outputs
    if rollout.segments:
        outputs = [_output(segment) for segment in rollout.segments]
        for output in outputs:
            output.extra_fields[CUT_OFF] = session.outputs[-1].extra_fields[CUT_OFF]
        session = Session(outputs, session.columns | {MAX_TOKENS: limit})
    own = [segment.fields for segment in rollout.segments] or [{}] * len(session.outputs)
    for output, fields in zip(session.outputs, own, strict=True):
        output.extra_fields.update(rollout.fields | fields)
    return session


def _output(segment: Segment) -> Any:
    """verl's output of the rollout, from the segment's first token on."""
    outputs, piece = segment.rollout.outputs.outputs, slice(segment.start, segment.end)
    if len(outputs) != 1:
        raise DataError(f"a conversation of {len(outputs)} outputs is published as these, and not in segments")
    (whole,) = outputs
    changes = {
        "prompt_ids": whole.prompt_ids + whole.response_ids[: segment.start],
        "response_ids": whole.response_ids[piece],
        "response_mask": whole.response_mask[piece],
        "response_logprobs": whole.response_logprobs and whole.response_logprobs[piece],
        "extra_fields": {**whole.extra_fields, OFFSET: segment.start},
    }
    return whole.model_copy(update=changes)
