"""What two steps of a tiny model need beside each training recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from typer.testing import CliRunner

from verl_plugins.commands.cli import app
from verl_plugins.composition import manifest, recipe

TEMPLATES = Path(__file__).parents[1] / "benchmarks/short_templates.yaml"
AUGMENTED = (f"plugins.prompt_augmentation.templates=[{TEMPLATES}]", "plugins.prompt_augmentation.validation=begun")
VOTES = ("plugins.ttrl.n_votes=12", "actor_rollout_ref.rollout.n=4")
SEVERAL_UPDATES = (
    "trainer.v1.separate_async.parameter_sync_step=2",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
)
OPTIONS = {
    "be_more_active": AUGMENTED,
    "evol_rl": (*VOTES, "plugins.evol_rl.valid=answer_extracted"),
    "igpo": ("~plugins.word_f1", "plugins.igpo.sentence=''", "actor_rollout_ref.actor.loss_agg_mode=token-mean"),
    "kl_cov": SEVERAL_UPDATES,
    "mc_grpo": ("actor_rollout_ref.rollout.n=9",),
    "prompt_augmentation": AUGMENTED,
    "riskpo": ("plugins.riskpo.bundle_size=4",),
    "sage": ("plugins.sage.hint_max_tokens=8", "data.max_prompt_length=256"),
    "siri": ("plugins.siri.cycle_length=2", "plugins.siri.min_length=1"),
    "spo_chain": ("plugins.spo_chain.interval=1", "plugins.spo_chain.samples=3", "actor_rollout_ref.rollout.n=4"),
    "spo_tree": ("plugins.spo_tree.branches=[4,3,2]", "plugins.spo_tree.segment_tokens=1", "plugins.spo_tree.rows=128"),
    "ttrl": VOTES,
}
"""What two steps of a tiny model need beside the recipe."""
PARTNERS = {"be_more_active": "prompt_augmentation+be_more_active"}
PRESETS = {"igpo": "lookup"}
UNEQUAL = {"sage", "spo_tree"}
"""Recipes whose groups differ in size."""
RECIPES = sorted(item.name for item in recipe.recipes(manifest.folders(manifest.entries())) if item.kind == "training")


def solved(folder: Path) -> tuple[str, ...]:
    """Overrides for data with worked solutions, which sage makes hints of."""
    rows = [{"question": f"{a}+{b}=", "answer": f"{a}+{b}.\n#### {a + b}"} for a in range(8) for b in range(8)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = CliRunner().invoke(app, ["data", "convert", f"{folder}/sums.jsonl", "--to", f"{folder}/sums.parquet"])
    assert done.exit_code == 0, done.output
    return tuple(f"data.{key}_files={folder}/sums.parquet" for key in ("train", "val"))


def needed(names: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Overrides for a run of these recipes together; files are put into `folder`."""
    words = [word for name in names for word in OPTIONS.get(name, ())]
    return (*words, *(solved(folder) if "sage" in names else ()))
