"""Plugin state in verl's checkpoints: the part of the trainer that saves and resumes."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

from omegaconf import OmegaConf
from verl.trainer.ppo.v1 import trainer_base

from verl_plugins.bridge import checkpoint


class SavesState:
    """Mixed into one of verl's trainers; expects `plugins`, `rows` and `seed`."""

    _saved_step = 0

    def _load_checkpoint(self) -> None:
        self.actor_rollout_wg.set_plugins(OmegaConf.to_container(self.config.plugins), self.seed)
        super()._load_checkpoint()
        if self.global_steps > 0:
            self._load_plugin_state()

    def _save_checkpoint(self) -> None:
        """Plugin state first: verl writes its "latest" marker at the end of its own saving."""
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        states = {
            "driver": {plugin.name: plugin.state_dict() for plugin in self.plugins},
            "actor": self.actor_rollout_wg.plugin_state()[0],
        }
        checkpoint.save(folder, self.global_steps, self.rows.fingerprint, self.plugins, states)
        with patch.object(trainer_base, "open", checkpoint.open_whole, create=True):
            super()._save_checkpoint()  # its marker, else empty for a moment, appears in one piece
        self._saved_step = self.global_steps

    def _load_plugin_state(self) -> None:
        folder = self._checkpoint_folder()
        states = checkpoint.load(folder, self.global_steps, self.rows.fingerprint, self.plugins)
        for plugin in self.plugins:
            if plugin.name in states["driver"]:
                plugin.load_state_dict(states["driver"][plugin.name])
        self.actor_rollout_wg.load_plugin_state(states["actor"])

    def _checkpoint_folder(self) -> Path:
        trainer = self.config.trainer
        if trainer.resume_mode == "resume_path":
            return Path(trainer.resume_from_path)
        return Path(trainer.default_local_dir) / f"global_step_{self.global_steps}"
