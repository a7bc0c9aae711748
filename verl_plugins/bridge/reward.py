"""Rewards in verl's reward workers: the stage `score_answer`, and verl's own reward function behind it."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf
from verl import DataProto
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager

from verl_plugins.bridge import census
from verl_plugins.bridge.failures import Executor
from verl_plugins.composition.blame import crossing
from verl_plugins.services import Answer, Verdict


class PluginRewardManager(NaiveRewardManager):
    """Asks the plugins first; an answer none of them scores goes to verl's reward function."""

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **kwargs: Any) -> None:
        super().__init__(config, tokenizer, compute_score, **kwargs)
        self.plugins = census.build(OmegaConf.to_container(config.plugins), "reward worker")
        for plugin in self.plugins:
            plugin.start_scoring()
        self._threads = Executor(thread_name_prefix="reward")

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """Score the last output of one session."""
        self.loop.set_default_executor(self._threads)
        verdict: Verdict | None = None
        if self.plugins.implements("score_answer"):
            verdict = await self.loop.run_in_executor(None, self._score, self._answer(data[-1:][0]))
        if verdict is None:
            with crossing():
                return await super().run_single(data)
        info = {**verdict.parts, "score": float(verdict.score), "acc": float(verdict.correct)}
        return {"reward_score": float(verdict.score), "reward_extra_info": info}

    def _score(self, answer: Answer) -> Verdict | None:
        with crossing():
            return self.plugins.hook.score_answer(answer=answer)

    def _answer(self, item: Any) -> Answer:
        response = item.batch["responses"]
        length = int(item.batch["attention_mask"][-response.shape[-1] :].sum())
        columns = item.non_tensor_batch
        return Answer(
            text=self.tokenizer.decode(response[:length], skip_special_tokens=True),
            ground_truth=(columns.get("reward_model") or {}).get("ground_truth"),
            data_source=str(columns.get("data_source") or ""),
            extra_info=dict(columns.get("extra_info") or {}),
            columns={**columns, **(columns.get("tool_extra_fields") or {})},
        )
