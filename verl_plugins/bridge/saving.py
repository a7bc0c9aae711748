"""Plugin state in verl's checkpoints: the part of the trainer that saves and resumes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from omegaconf import OmegaConf
from verl.trainer.ppo.v1 import trainer_base

from verl_plugins.bridge import checkpoint, intact


class SavesState:
    """Mixed into one of verl's trainers; expects `plugins`, `rows` and `seed`."""

    _saved_step = 0
    _marker: tuple[str, io.StringIO] | None = None
    """verl's "latest" marker of a checkpoint that is complete but not marked yet: its file and content."""

    def _load_checkpoint(self) -> None:
        section = OmegaConf.to_container(self.config.plugins)
        self.actor_rollout_wg.set_plugins(section, self.seed)
        self._set_critic_plugins(section)
        self._shape_served_logits(section)
        checkpoint.try_saving(self._states())  # here, and not at the first checkpoint hours later
        super()._load_checkpoint()
        if self.global_steps > 0:
            self._load_plugin_state()

    def _save_checkpoint(self) -> None:
        """Plugin state, then verl's files; the "latest" marker that verl writes last is kept back.

        The step counts once its line is in the metrics and its rollouts are dumped: then comes `mark_checkpoint`.
        """
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        states = self._states()
        (folder / intact.FILES).unlink(missing_ok=True)
        checkpoint.save(folder, self.global_steps, self.rows.fingerprint, self.plugins, states)
        with patch.object(trainer_base, "open", self._keep_marker, create=True):
            super()._save_checkpoint()
        self._saved_step = self.global_steps

    def _states(self) -> checkpoint.States:
        """State of all plugins, by process and plugin."""
        driver = {plugin.name: plugin.state_dict() for plugin in self.plugins}
        critic = {"critic": self.critic_wg.plugin_state()[0]} if self._acts_on_critic else {}
        return {"driver": driver, "actor": self.actor_rollout_wg.plugin_state()[0], **critic}

    @contextmanager
    def _keep_marker(self, file: str, mode: str = "r") -> Iterator[io.StringIO]:
        self._marker = file, io.StringIO()
        yield self._marker[1]

    def mark_checkpoint(self) -> None:
        """Mark what was saved in this step, if anything was, as the latest checkpoint."""
        if self._marker is None:
            return
        file, content = self._marker
        intact.record(Path(self.config.trainer.default_local_dir) / f"global_step_{self._saved_step}")
        with checkpoint.open_whole(file, "w") as marker:
            marker.write(content.getvalue())
        self._marker = None

    def _log_rollout_data(self, *args: Any, **kwargs: Any) -> None:
        """verl's dump of a step's rollouts, written when a checkpoint of the step is marked."""
        super()._log_rollout_data(*args, **kwargs)
        if self._marker is not None:
            wait(self._dump_futures)
        self.mark_checkpoint()

    def _load_plugin_state(self) -> None:
        folder = self._checkpoint_folder()
        states = checkpoint.load(folder, self.global_steps, self.rows.fingerprint, self.plugins)
        for plugin in self.plugins:
            if plugin.name in states["driver"]:
                plugin.load_state_dict(states["driver"][plugin.name])
        self.actor_rollout_wg.load_plugin_state(states["actor"])
        if self._acts_on_critic:
            self.critic_wg.load_plugin_state(states["critic"])

    def _checkpoint_folder(self) -> Path:
        trainer = self.config.trainer
        if trainer.resume_mode == "resume_path":
            return Path(trainer.resume_from_path)
        return Path(trainer.default_local_dir) / f"global_step_{self.global_steps}"
