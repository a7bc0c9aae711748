"""Every lab of ours through the installed command, from recipe to picture; the long ones by `make test-labs`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from verl_plugins.composition import manifest, recipe

pytestmark = pytest.mark.e2e

COMMAND = Path(sys.executable).with_name("verl-plugins")
BROKEN = {
    "action_grouping": ("deviation=0", "the best fixed grouping gets coarser as the noise grows"),
    "beyond_vanilla_vae": ("iterations=2", "squared singular values of U"),
    "exploration_cooperation": ("steps=2000", "every shared run ends all or nothing"),
    "mgt": ("layers=1", "a residual stack keeps more than one without skips"),
    "mixup_nc": ("num_classes=2", "they are longer than the straight mix"),
    "nc_deep_linear": ("iterations=3", "no descent ends below the formula's objective"),
    "nc_perturbation": ("feature_decay=0", "the features' regularisation moves variability more than the classifier's"),
    "nrr_core": ("zero_padding=true", "NRR-lite keeps more bits"),
    "ravl": ("rollout_steps=30", "one member fails, though the dynamics are exact"),
    "perp_grad": ("epochs=20", "⊥AdamW comes to know the sums that it was not shown"),
    "stablemax": ("epochs=20", "StableMax with ⊥SGD comes to know the sums that it was not shown"),
    "posterior_collapse_attack": ("training_steps=20", "the attack harms the reconstruction"),
}
"""A setting with which a claim of each lab fails, and the claim."""


def test_every_lab_of_ours_is_run_here() -> None:
    found = recipe.recipes(manifest.folders(manifest.entries()))
    assert {item.name for item in found if item.lab and item.distribution == "verl-plugins"} == BROKEN.keys()


LONG = ("exploration_cooperation", "perp_grad", "stablemax")
"""Take 40 s of a core and more."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.labs] * (name in LONG)) for name in BROKEN])
class TestLab:
    def test_its_claims_hold(self, name: str, tmp_path: Path) -> None:
        done = subprocess.run([COMMAND, "lab", name, "--out", tmp_path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["holds"] and len(found["claims"]) >= 3
        assert (tmp_path / f"{name}.png").stat().st_size < 60_000

    def test_a_setting_that_breaks_a_claim_is_noticed(self, name: str) -> None:
        setting, claim = BROKEN[name]
        done = subprocess.run([COMMAND, "lab", name, "--set", setting], capture_output=True, text=True)
        assert done.returncode == 1
        assert f"does not hold: {claim}" in done.stderr
