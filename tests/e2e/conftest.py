"""Trainings that several tests look at, each done once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.register_assert_rewrite("training", "resuming", "running")

HERE = Path(__file__).parent
METADATA = "Metadata-Version: 2.1\nName: every-stage\nVersion: 1.0\n"
ENTRIES = (
    "[verl_plugins]\nevery_stage = every_stage:EveryStage\nbroken = broken:Broken\nfailing = "
    "broken:Failing\nin_turn = in_turn:InTurn\ntrouble = trouble:Trouble\nunsaved = trouble:Unsaved\n"
)
ENTRIES += "alike = alike:Alike\nleft_over = left_over:LeftOver\nrecipes = es_recipes:RECIPES\n"
RECIPES = {
    "every_stage": "plugins: {every_stage: {}}\nalgorithm: {adv_estimator: grpo}\n",
    "in_turn": "plugins: {grpo: {}, in_turn: {}}\nalgorithm: {adv_estimator: grpo}\n",
    "failing": "plugins: {failing: {}, grpo: {}}\nalgorithm: {adv_estimator: grpo}\n",
    "trouble": "plugins: {grpo: {}, trouble: {}}\nalgorithm: {adv_estimator: grpo}\n",
    "unsaved": "plugins: {grpo: {}, unsaved: {}}\nalgorithm: {adv_estimator: grpo}\n",
    "broken": "plugins: {broken: {}}\nalgorithm: {adv_estimator: grpo}\n",
}
BROKEN = '''
"""Fails when it first sees a batch."""
from verl_plugins import DataError, Plugin, hookimpl

class Broken(Plugin):
    name = "broken"

    @hookimpl
    def estimate_advantage(self, run, batch):
        raise DataError(f"step {run.step}: the {len(batch)} rewards are not what the broken plugin can use")

class Failing(Plugin):
    name = "failing"

    @hookimpl
    async def rollout_group(self, run, prompt, sample):
        if run.step == 1 and prompt.id % 2:
            return None
        raise KeyError(f"level of prompt {prompt.id % 1}")
'''


@pytest.fixture(scope="session")
def third_party(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed distribution: two plugins and their recipes."""
    site = tmp_path_factory.mktemp("site")
    for file in ("every_stage.py", "in_turn.py", "trouble.py", "odd_loop.py", "alike.py", "left_over.py"):
        shutil.copy(HERE / file, site)
    (site / "broken.py").write_text(BROKEN)
    information = site / "every_stage-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(METADATA)
    (information / "entry_points.txt").write_text(ENTRIES)
    folder = site / "es_recipes_files"
    folder.mkdir()
    (site / "es_recipes.py").write_text(
        "from pathlib import Path\nRECIPES = Path(__file__).parent / 'es_recipes_files'"
    )
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(f"recipe: {{title: {name}}}\n{text}")
    return site


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where run folders are made."""
    return tmp_path_factory.mktemp("runs")
