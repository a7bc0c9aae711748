"""verl's reward worker with our manager: a reward function that fails costs its answer, and not the worker."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from agents import EOS
from verl.experimental.reward_loop import reward_loop

from verl_plugins import CompositionError, DataError, Plugin, Verdict, hookimpl
from verl_plugins.bridge import census
from verl_plugins.bridge.launch import finish
from verl_plugins.bridge.rows import _reward_input
from verl_plugins.composition import outcome
from verl_plugins.composition.compose import compose
from verl_plugins.composition.manager import Plugins
from verl_plugins.errors import PluginFailed

FUNCTION = """
import asyncio

def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    if extra_info["index"] == 0:
        raise {raised}
    return 1.0
"""
RAISED = [
    ("ValueError('injected')", "injected"),
    ("StopIteration", "StopIteration"),
    ("SystemExit('injected')", "SystemExit: injected"),
    ("asyncio.CancelledError('injected')", "CancelledError"),
]


@pytest.fixture
def score(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Scores the answer to row 0 or another, with these overrides and plugins."""

    def ask(
        row: int, *overrides: str, plugins: tuple[Plugin, ...] = (), said: dict[str, Any] | None = None, **more: Any
    ) -> dict[str, Any]:
        path = f"actor_rollout_ref.model.path={tiny}"
        config = finish(compose("grpo", "cpu", [path, *overrides]).config, tmp_path)
        monkeypatch.setattr(census, "build", lambda section, role: Plugins(plugins, check=outcome.check))
        output = SimpleNamespace(prompt_ids=[3], response_ids=[7, EOS], num_turns=2, extra_fields=said or {})
        columns = {"data_source": "sums", "reward_model": {"ground_truth": "2"}, "extra_info": {"index": row}, **more}

        async def run() -> Any:
            worker = reward_loop.RewardLoopWorker(config)
            return await asyncio.wait_for(worker.compute_score_batch(_reward_input([output], [columns])), 10)

        return asyncio.run(run())[0]

    return ask


@pytest.mark.parametrize(("raised", "told"), RAISED)
def test_a_function_of_the_user_s(score, tmp_path, raised, told) -> None:
    function = tmp_path / "function.py"
    function.write_text(FUNCTION.format(raised=raised))
    chosen = (f"reward.custom_reward_function.path={function}", "~plugins.math_verify")
    with pytest.raises(Exception, match=told):
        score(0, *chosen)
    assert score(1, *chosen)["reward_score"] == 1.0


@pytest.mark.parametrize(
    "error", [ValueError("injected"), StopIteration("injected"), SystemExit("injected"), asyncio.CancelledError()]
)
def test_a_plugin(score, error) -> None:
    class Broken(Plugin):
        name = "broken"

        @hookimpl
        def score_answer(self, answer):
            if answer.extra_info["index"] == 0:
                raise error
            return Verdict(1.0, correct=True)

    with pytest.raises(PluginFailed) as raised:
        score(0, plugins=(Broken(None),))
    assert f"(plugin 'broken' in score_answer, {__file__}:" in str(raised.value)
    assert type(error).__name__ in str(raised.value)
    assert score(1, plugins=(Broken(None),))["reward_extra_info"]["acc"] == 1.0


def test_an_answer_has_the_columns_of_its_row(score) -> None:
    class Reads(Plugin):
        name = "reads"

        @hookimpl
        def score_answer(self, answer):
            found = {name: answer.extra(name) for name in ("stratum", "role", "index")}
            with pytest.raises(DataError, match="'nowhere' is neither a column"):
                answer.extra("nowhere")
            return Verdict(1.0, correct=True, parts=found)

    told = score(4, plugins=(Reads(None),), said={"role": "solver"}, stratum=3, role="of the dataset")
    parts = told["reward_extra_info"]
    assert (parts["stratum"], parts["role"], parts["index"]) == (3, "solver", 4), "the session's own comes first"


def test_another_manager_gives_no_room_to_plugins(tiny, tmp_path, sentence) -> None:
    composed = compose("grpo", "cpu", [f"actor_rollout_ref.model.path={tiny}", "reward.reward_manager.name=dapo"])
    with pytest.raises(CompositionError) as error:
        finish(composed.config, tmp_path)
    sentence(error.value, "reward.reward_manager.name=dapo", "~plugins.math_verify")
