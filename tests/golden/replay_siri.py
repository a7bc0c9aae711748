"""SIRI: budgets through the hook that sets them, rewards and truncation of a rollout that stops at the budget."""

from types import SimpleNamespace

import torch
from cases import Case
from fakes import FakeRun
from omegaconf import OmegaConf

from verl_plugins import Batch
from verl_plugins.sampling.siri import THINK_END, Siri, length_budget
from verl_plugins.services import Prompt, Prompts

PHASES = ("compression", "expansion")
SCHEDULE = ("scheduler", "cycle_length", "max_length", "min_length")
END, OTHER = 2, 7
"""Token ids: the end of a response, anything else."""


def replay(case: Case, expected: dict) -> dict:
    return schedule(case) if case.has("step") else rewards(case)


def schedule(case: Case) -> dict:
    longest, usual = case.param("max_length"), Siri.Config()
    defaults = (usual.scheduler, usual.cycle_length, longest, longest // 2)
    settings = {name: case.param(name, value) for name, value in zip(SCHEDULE, defaults, strict=True)}
    plugin = Siri(Siri.Config(**settings))
    config = OmegaConf.create({"data": {"max_response_length": longest}})
    found = {"length": [], "length_int": [], "phase": []}
    for t in case.input("step"):
        run, prompt = FakeRun(config=config, step=t + 1), Prompt(0, {})
        plugin.prepare_prompts(run, Prompts([prompt]))
        found["length"].append(length_budget(t, *settings.values()))
        found["length_int"].append(prompt.max_tokens)
        found["phase"].append(PHASES[int(run.metrics["phase"])])
    return found


def integers(values: list) -> torch.Tensor:
    """Null, as where there is no answer, is 0."""
    return torch.tensor([value or 0 for value in values], dtype=torch.int64)


def rewards(case: Case) -> dict:
    """A response stops at its budget; the verifier finds an answer that was complete by then."""
    columns = ("length_cap", "response_length", "answer_end", "answer_correct")
    caps, wanted, end, right = (integers(case.input(name)) for name in columns)
    lengths = torch.minimum(caps, wanted)
    verdict = (right > 0) & (end > 0) & (end <= lengths)
    responses = torch.full((len(caps), max(int(lengths.max()), 1)), OTHER)
    finished = ((wanted <= caps) & (wanted > 0)).nonzero()[:, 0]
    responses[finished, lengths[finished] - 1] = END
    mask = torch.arange(responses.shape[1]) < lengths[:, None]
    scores = torch.where(verdict, case.param("correct_reward", 1.0), case.param("wrong_reward", 0.0))
    batch = Batch.from_tensors(
        uid=[f"{row}-1-0" for row in range(len(caps))],
        rm_scores=torch.zeros(mask.shape).scatter_(1, (lengths[:, None] - 1).clamp(min=0), scores[:, None]),
        response_mask=mask,
        responses=responses,
        response_lengths=lengths,
        __max_tokens__=caps.tolist(),
        budget=2 * int(caps.max()),
        tokenizer=SimpleNamespace(
            eos_token_id=END, batch_decode=lambda rows, **_: [THINK_END * (END in row) for row in rows]
        ),
    )
    plugin = Siri(Siri.Config(require_think_end=case.param("require_think_end", False)))
    plugin.shape_rewards(FakeRun(), batch)
    return {"reward": batch.scores, "truncated": batch.truncated}
