"""For authors of plugins: `check_plugin`, the laws a plugin must keep, and stand-ins for what hooks are handed.

Needs no trainer, no GPU, no Ray; verl must be installed but is not imported.
"""

from verl_plugins.testing.check import PluginCheckError, check_plugin
from verl_plugins.testing.fakes import FakeActor, FakeDataset, FakeRun, FakeTokenizer
from verl_plugins.testing.golden import Case, differences, read_cases
from verl_plugins.testing.scenario import Scenario

__all__ = [
    "Case",
    "FakeActor",
    "FakeDataset",
    "FakeRun",
    "FakeTokenizer",
    "PluginCheckError",
    "Scenario",
    "check_plugin",
    "differences",
    "read_cases",
]
