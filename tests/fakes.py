"""The stand-ins that authors of plugins use too, under the name this suite's tests import."""

from verl_plugins.testing import FakeActor, FakeDataset, FakeRun, FakeTokenizer

__all__ = ["FakeActor", "FakeDataset", "FakeRun", "FakeTokenizer"]
