"""My method: the file by hand."""

import json
from pathlib import Path

from my_method.method import MyMethod
from omegaconf import OmegaConf

from verl_plugins.testing import FakeRun


def test_by_hand(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    config = OmegaConf.create({"trainer": {"default_local_dir": str(folder)}})
    MyMethod(MyMethod.Config(file="end.json")).on_train_end(FakeRun(config=config, step=7))
    assert json.loads((folder / "end.json").read_text()) == {"steps": 7}
