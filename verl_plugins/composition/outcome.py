"""What each stage may give, checked when a plugin returns: its own error there, and not another's later.

Tensors are looked at in one pass; nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from verl_plugins.composition.blame import add_note
from verl_plugins.errors import DataError, ResultError
from verl_plugins.services import Rollout, Verdict

Check = Callable[[Any, Mapping[str, Any]], None]
"""Takes what one implementation or wrapper gave, and the arguments of the stage; raises ResultError."""


def _selected(chosen: Any, arguments: Mapping[str, Any]) -> None:
    if chosen is None:
        return
    count, size = arguments["count"], len(arguments["run"].dataset)
    try:
        ids = chosen.tolist() if hasattr(chosen, "tolist") else list(chosen)
    except TypeError:
        raise ResultError(f"select_prompts returned {_kind(chosen)}, expected {count} prompt ids") from None
    if wrong := [value for value in ids if not isinstance(value, Integral) or isinstance(value, bool)]:
        raise ResultError(f"select_prompts returned {wrong[0]!r} among the prompt ids, which are whole numbers")
    if len(ids) != count or len(set(ids)) != count:
        raise ResultError(f"select_prompts returned {len(set(ids))} distinct prompt ids; {count} are asked")
    if outside := [value for value in ids if not 0 <= value < size]:
        raise ResultError(f"select_prompts returned the id {outside[0]}, outside the {size} rows of the dataset")


def _prepared(stage: str) -> Check:
    def check(result: Any, arguments: Mapping[str, Any]) -> None:
        _nothing(stage, result, "edit the prompts in place")
        prompts = arguments["prompts"]
        every = {name for prompt in prompts for name in prompt.row}
        for name in sorted(every) if any(prompt.row.keys() != every for prompt in prompts) else ():
            having = sum(name in prompt.row for prompt in prompts)
            if having < len(prompts):
                raise ResultError(f"{stage}: column {name!r} was set on {having} of {len(prompts)} prompts")
        for prompt in prompts:
            _asked(stage, prompt)

    return check


def _asked(stage: str, prompt: Any) -> None:
    """Messages with a role and a content each; sizes that are whole numbers of at least 1."""
    messages = prompt.row.get("raw_prompt")
    sound = isinstance(messages, Sequence) or hasattr(messages, "tolist")
    if not sound or isinstance(messages, str) or not len(messages) or not all(map(_is_message, messages)):
        raise ResultError(
            f"{stage}: the messages of prompt {prompt.id} are {messages!r:.120}, expected a list of "
            "{'role': …, 'content': …}"
        )
    for name, words in (("__rollout_n__", "group_size"), ("__max_tokens__", "max_tokens")):
        value = prompt.row.get(name, 1)
        if not isinstance(value, Integral) or value < 1:
            raise ResultError(f"{stage}: {words} of prompt {prompt.id} is {value!r}, expected a whole number from 1 on")
    if not isinstance(prompt.row.get("__prefill__", ""), str):
        raise ResultError(f"{stage}: prefill of prompt {prompt.id} is {prompt.prefill!r:.80}, expected text")


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and "role" in message and "content" in message


def _group(rollouts: Any, arguments: Mapping[str, Any]) -> None:
    if rollouts is None:
        return
    if not isinstance(rollouts, Sequence) or not all(isinstance(rollout, Rollout) for rollout in rollouts):
        raise ResultError(f"rollout_group returned {_kind(rollouts)}, expected a list of what sample() gave")
    if len({id(rollout.outputs) for rollout in rollouts}) != len(rollouts):
        raise ResultError("rollout_group returned a rollout twice; sample another one instead")
    for rollout in rollouts:
        _in_segments(rollout)


def _in_segments(rollout: Rollout) -> None:
    """Its segments follow each other within the response, and the last one ends it."""
    ids, before = list(rollout.response_ids), 0
    for place, segment in enumerate(rollout.segments, 1):
        last = place == len(rollout.segments)
        what = f"rollout_group: segment {place} of a response of {len(ids)} tokens is {segment.start} to {segment.end}"
        if not before <= segment.start <= segment.end <= len(ids) or (segment.start == segment.end and not last):
            raise ResultError(f"{what}; segments follow each other from {before} on, and only the last may be empty")
        if last and segment.end != len(ids):
            raise ResultError(f"{what}; the last one ends the response, which counts by it")
        if list(segment.rollout.response_ids[: segment.end]) != ids[: segment.end]:
            raise ResultError(f"{what}, and its rollout has other tokens there")
        before = segment.end


def _scored(verdict: Any, arguments: Mapping[str, Any]) -> None:
    if verdict is None:
        return
    if not isinstance(verdict, Verdict):
        raise ResultError(f"score_answer returned {_kind(verdict)}, expected a Verdict or None")
    if not _finite_number(verdict.score):
        raise ResultError(f"score_answer returned the score {verdict.score!r:.80}, expected a finite number")
    if not isinstance(verdict.parts, Mapping) or not all(isinstance(name, str) for name in verdict.parts):
        raise ResultError(f"score_answer returned the parts {verdict.parts!r:.80}, expected a dict with names as keys")
    if wrong := [name for name, part in verdict.parts.items() if isinstance(part, Real) and not math.isfinite(part)]:
        raise ResultError(f"score_answer returned {wrong[0]}={verdict.parts[wrong[0]]!r}, expected a finite number")


def _shaped(result: Any, arguments: Mapping[str, Any]) -> None:
    _nothing("shape_rewards", result, "assign batch.rewards")
    batch = arguments["batch"]
    _finite("shape_rewards left rewards", batch.written.get("rm_scores"), batch.keys.__getitem__)


def _chosen_rows(result: Any, arguments: Mapping[str, Any]) -> None:
    _nothing("select_rows", result, "call batch.drop or batch.add")


def _advantage(advantages: Any, arguments: Mapping[str, Any]) -> None:
    batch = arguments["batch"]
    hint = ", see batch.to_tokens"
    _per_token("estimate_advantage", advantages, batch.response_mask.shape, hint)
    _finite("estimate_advantage returned", advantages, batch.keys.__getitem__)


def _loss(losses: Any, arguments: Mapping[str, Any]) -> None:
    _of_tokens("policy_loss", losses, arguments["tokens"])


def _value_loss(losses: Any, arguments: Mapping[str, Any]) -> None:
    values = arguments["values"]
    _per_token("value_loss", losses, values.response_mask.shape, "")
    where = f"of micro-batch {values.micro_batch}, mini-batch {values.mini_batch}, step {values.step}"
    try:
        _finite("value_loss returned", losses, lambda row: f"{row} {where}")
    except ResultError:
        for name in ("values", "old_values", "returns"):
            if not math.isfinite(getattr(values, name).detach().sum()):
                raise DataError(f"the critic's loss was given {name} that are not finite, {where}") from None
        raise


def _shaped_logits(shaped: Any, arguments: Mapping[str, Any]) -> None:
    """Their values are not looked at: there are a vocabulary's for every token, and what is wrong shows in the loss."""
    logits = arguments["logits"]
    if shaped is None:
        return
    if not hasattr(shaped, "is_floating_point"):
        raise ResultError(f"shape_logits returned {_kind(shaped)}, expected logits {tuple(logits.shape)}")
    if shaped.shape != logits.shape:
        raise ResultError(
            f"shape_logits returned shape {tuple(shaped.shape)}, expected that of the logits, {tuple(logits.shape)}"
        )
    if not shaped.is_floating_point():
        raise ResultError(f"shape_logits returned {shaped.dtype}, expected floating numbers")


def _distillation(losses: Any, arguments: Mapping[str, Any]) -> None:
    distilled = arguments["distilled"]
    shape, what = (len(distilled.hidden),), "distillation_loss"
    if not hasattr(losses, "is_floating_point"):
        raise ResultError(f"{what} returned {_kind(losses)}, expected a tensor [tokens] {shape}")
    if tuple(losses.shape) != shape:
        raise ResultError(f"{what} returned shape {tuple(losses.shape)}, expected [tokens] {shape}")
    if not losses.is_floating_point():
        raise ResultError(f"{what} returned {losses.dtype}, expected floating numbers")
    if not math.isfinite(losses.detach().sum()):
        place = f"micro-batch {distilled.micro_batch}, mini-batch {distilled.mini_batch}, step {distilled.step}"
        raise ResultError(f"{what} returned numbers that are not finite in {place}")


def _terms(terms: Any, arguments: Mapping[str, Any]) -> None:
    if terms is None:
        return
    if not isinstance(terms, Mapping) or not all(isinstance(name, str) for name in terms):
        raise ResultError(f"loss_terms returned {_kind(terms)}, expected a dict of terms by name")
    for name, term in terms.items():
        _of_tokens(f"loss_terms {name!r}", term, arguments["tokens"])


def _of_tokens(what: str, values: Any, tokens: Any) -> None:
    _per_token(what, values, tokens.log_probs.shape, "")
    try:
        _finite(f"{what} returned", values, lambda row: _row_of(tokens, row))
    except ResultError:
        for name in ("log_probs", "old_log_probs", "advantages"):
            _given(name, getattr(tokens, name), tokens)
        raise


def _given(name: str, values: Any, tokens: Any) -> None:
    """What the loss was given is finite; if not, no plugin of the loss is to blame."""
    try:
        _finite(f"the loss was given {name} with", values, lambda row: _row_of(tokens, row))
    except ResultError as error:
        found = DataError(str(error))
        add_note(found, "the model or an earlier stage, before any plugin in the loss")
        raise found from None


def _row_of(tokens: Any, row: int) -> str:
    place = f"{row} of micro-batch {tokens.micro_batch}, mini-batch {tokens.mini_batch}, step {tokens.step}"
    if not bool(tokens.response_mask.any()):
        return f"{place}, which holds padding rows only"
    try:
        return f"{place}, of draw {tokens.extra('uid')[row]}"
    except (DataError, IndexError, TypeError):
        return place


def _norm(norm: Any, arguments: Mapping[str, Any]) -> None:
    """A norm that is not finite is no error: verl skips that update, and the driver says so."""
    if norm is not None and not hasattr(norm, "item") and not isinstance(norm, Real):
        raise ResultError(f"optimizer_step returned {_kind(norm)}, expected the norm of the gradients")


def _per_token(what: str, values: Any, shape: Sequence[int], hint: str) -> None:
    if not hasattr(values, "is_floating_point"):
        raise ResultError(f"{what} returned {_kind(values)}, expected a tensor [rows, tokens] {tuple(shape)}{hint}")
    if values.shape != shape:
        raise ResultError(f"{what} returned shape {tuple(values.shape)}, expected [rows, tokens] {tuple(shape)}{hint}")
    if not values.is_floating_point():
        raise ResultError(f"{what} returned {values.dtype}, expected floating numbers")


def _finite(what: str, values: Any, name_of: Callable[[int], str]) -> None:
    """All of [rows] or [rows, tokens] are finite; else the first row that is not is named."""
    # A sum is finite only if every term is: looking for the row can wait until there is one.
    if values is None or math.isfinite(values.detach().sum()):
        return
    bad = (~values.detach().isfinite()).nonzero()
    if len(bad):
        row, token = bad[0].tolist()
        raise ResultError(f"{what} {float(values[row, token])} at token {token} of row {name_of(row)}")


def _finite_number(value: Any) -> bool:
    try:
        return not isinstance(value, str) and math.isfinite(value)
    except (TypeError, ValueError):
        return False


def _allowed(stage: str, arguments: Mapping[str, Any]) -> None:
    """Only what its stage may do to the batch was done."""
    batch = arguments.get("batch")
    if batch is None:
        return
    done = [("drop", bool(batch.dropped.any())), ("skip_update", batch.update_skipped)]
    done += [("add" if new.past is None else "bring_back", True) for new in batch.additions]
    for what in [name for name, called in done if called and stage != "select_rows"]:
        raise ResultError(f"{stage} called batch.{what}, which only select_rows may")
    if stage in LATER and "rm_scores" in batch.written:
        raise ResultError(f"{stage} assigned batch.rewards, too late for the advantages: do it in shape_rewards")


def _nothing(stage: str, result: Any, instead: str) -> None:
    # What a wrapper gives is the list of all results.
    if result is not None and not isinstance(result, list):
        raise ResultError(f"{stage} returned {_kind(result)}, which nothing reads: {instead}")


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


CHECKS: Mapping[str, Check] = {
    "select_prompts": _selected,
    "prepare_prompts": _prepared("prepare_prompts"),
    "prepare_validation": _prepared("prepare_validation"),
    "rollout_group": _group,
    "shape_logits": _shaped_logits,
    "score_answer": _scored,
    "shape_rewards": _shaped,
    "select_rows": _chosen_rows,
    "estimate_advantage": _advantage,
    "value_loss": _value_loss,
    "distillation_loss": _distillation,
    "policy_loss": _loss,
    "loss_terms": _terms,
    "optimizer_step": _norm,
}
EACH = ("loss_terms",)
"""Stages that call all and whose results are read: a wrapper gives the list of them."""
LATER = ("estimate_advantage", "observe")
"""Stages of the batch that come too late for its rewards."""
SILENT = ("estimate_advantage", "value_loss", "distillation_loss", "policy_loss")
"""Stages on which an implementation may give None and leave the answer to the next; a wrapper may not."""


def check(stage: str, result: Any, arguments: Mapping[str, Any], *, wraps: bool) -> None:
    """Refuse what a stage cannot give.

    Args:
        result: what one implementation gave, or a wrapper.
        arguments: of the stage, all of them.
        wraps: whether a wrapper gave it.

    Raises:
        ResultError: it has another type, shape or length than the stage's, is not finite, or names what does not exist.
    """
    _allowed(stage, arguments)
    look = CHECKS.get(stage)
    if look is None or (result is None and stage in SILENT and not wraps):
        return
    for one in result if wraps and stage in EACH and isinstance(result, list) else [result]:
        look(one, arguments)


def check_in_training(stage: str, result: Any, arguments: Mapping[str, Any], *, wraps: bool) -> None:
    """`check`, and that what the plugin was shown is as it was; `verl_plugins.testing` has a law for that.

    Raises:
        ResultError: as `check`, or a tensor was written into: others read it, or nobody does.
    """
    shown = next((arguments[name] for name in ("batch", "tokens", "distilled", "values") if name in arguments), None)
    if changed := getattr(shown, "changed_in_place", list)():
        instead = "assign batch.rewards or call batch.put" if "batch" in arguments else "compute a tensor of your own"
        raise ResultError(f"{stage} wrote into {changed[0]}, which others read as it was: {instead}")
    check(stage, result, arguments, wraps=wraps)
