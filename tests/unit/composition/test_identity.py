"""Which code a process has, what differs between two, and which plugins the environment keeps out."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from verl_plugins import CompositionError
from verl_plugins.bridge import census
from verl_plugins.bridge.environment import DIGESTS_VARIABLE
from verl_plugins.composition import identity, manager, manifest
from verl_plugins.composition.identity import MISSING, PACKAGE, Identity, difference, identify

HOOK = """
    @hookimpl
    def observe(self, run, batch):
        {body}
"""


@pytest.fixture(autouse=True)
def fresh_hashes() -> None:
    identity._hash.cache_clear()


class TestIdentity:
    def test_changes_with_a_source_file_and_only_then(self, site) -> None:
        site.plugin("method", HOOK.format(body="pass"))
        before = identify(["method", "grpo"], "driver").digests
        identity._hash.cache_clear()
        assert identify(["grpo", "method"], "actor worker").digests == before
        site.plugin("method", HOOK.format(body="return None"))
        identity._hash.cache_clear()
        after = identify(["method", "grpo"], "driver").digests
        assert {name for name in before if before[name] != after[name]} == {"method"}

    def test_names_versions(self) -> None:
        digests = identify(["grpo"], "driver").digests
        assert list(digests) == [PACKAGE, "grpo"]
        assert all(digest.startswith("0.") and len(digest.split()[1]) == 12 for digest in digests.values())

    def test_what_is_not_installed_is_missing(self) -> None:
        assert identify(["nothing"], "driver").digests["nothing"] == MISSING

    def test_the_difference_names_node_process_plugin_and_both_versions(self, sentence: Callable[..., None]) -> None:
        own = Identity("reward worker", "node-7", 1, {PACKAGE: "1 a", "vade": "1 b"})
        assert difference({PACKAGE: "1 a", "vade": "1 b"}, own) is None
        text = difference({PACKAGE: "1 a", "vade": "2 c"}, own)
        sentence(text, "node-7", "'vade'", "reward worker", "1 b", "2 c", "install")
        sentence(difference({PACKAGE: "1 z", "vade": "1 b"}, own), "package 'verl-plugins'")
        sentence(difference({**own.digests, "siri": "1 d"}, own), "'siri'", "missing")


class TestCensus:
    """What each process of a run does before it builds its plugins."""

    def test_the_same_code_is_reported_and_used(self, monkeypatch, capsys) -> None:
        for name, value in census.announce({"grpo": {}}).items():
            monkeypatch.setenv(name, value)
        assert [plugin.name for plugin in census.build({"grpo": {}}, "reward worker")] == ["grpo"]
        assert "reward worker (node " in capsys.readouterr().out

    def test_other_code_stops_the_process(self, monkeypatch, sentence: Callable[..., None]) -> None:
        digests = json.loads(census.announce({"grpo": {}})[DIGESTS_VARIABLE])
        monkeypatch.setenv(DIGESTS_VARIABLE, json.dumps({**digests, "grpo": "0.1.0 elsewhere"}))
        with pytest.raises(CompositionError) as error:
            census.build({"grpo": {}}, "actor worker 3")
        sentence(error.value, "'grpo'", "actor worker 3", "elsewhere")


class TestAllowAndBlock:
    def usable(self) -> set[str]:
        return {entry.name for entry in manifest.entries() if not manifest.is_recipes(entry)}

    def test_without_them_all_are_used(self, monkeypatch) -> None:
        monkeypatch.delenv("VERL_PLUGINS_ALLOW", raising=False)
        monkeypatch.delenv("VERL_PLUGINS_BLOCK", raising=False)
        assert {"grpo", "vade", "math_verify"} <= self.usable()

    def test_allow(self, monkeypatch) -> None:
        monkeypatch.setenv("VERL_PLUGINS_ALLOW", "grpo, vade")
        assert self.usable() == {"grpo", "vade"}

    def test_allow_that_is_empty_allows_none(self, monkeypatch) -> None:
        monkeypatch.setenv("VERL_PLUGINS_ALLOW", "")
        assert self.usable() == set()

    def test_block_wins_over_allow(self, monkeypatch) -> None:
        monkeypatch.setenv("VERL_PLUGINS_ALLOW", "grpo,vade")
        monkeypatch.setenv("VERL_PLUGINS_BLOCK", "vade")
        assert self.usable() == {"grpo"}

    def test_block_that_is_empty_blocks_none(self, monkeypatch) -> None:
        before = self.usable()
        monkeypatch.setenv("VERL_PLUGINS_BLOCK", "")
        assert self.usable() == before

    def test_asking_for_a_blocked_plugin_says_who_blocks_it(self, monkeypatch, sentence: Callable[..., None]) -> None:
        monkeypatch.setenv("VERL_PLUGINS_BLOCK", "vade")
        with pytest.raises(CompositionError) as error:
            manager.build({"vade": {}})
        sentence(error.value, "'vade'", "VERL_PLUGINS_BLOCK")

    def test_recipes_are_not_plugins(self, monkeypatch) -> None:
        monkeypatch.setenv("VERL_PLUGINS_ALLOW", "")
        assert any(manifest.is_recipes(entry) for entry in manifest.entries())


class TestTrace:
    def test_prints_calls_and_results(self, monkeypatch, capsys, site) -> None:
        monkeypatch.setenv("VERL_PLUGINS_TRACE", "1")
        site.plugin("watcher", HOOK.format(body="return 7"))
        manager.build({"watcher": {}}).hook.observe(run=None, batch=None)
        lines = capsys.readouterr().out.splitlines()
        assert "observe calls watcher (implements)" in lines[0]
        assert "observe gave list" in lines[1]

    def test_prints_what_was_raised(self, monkeypatch, capsys, site) -> None:
        monkeypatch.setenv("VERL_PLUGINS_TRACE", "1")
        site.plugin("watcher", HOOK.format(body="raise ValueError('too late')"))
        with pytest.raises(ValueError):
            manager.build({"watcher": {}}).hook.observe(run=None, batch=None)
        assert "observe gave ValueError: too late" in capsys.readouterr().out

    @pytest.mark.parametrize("value", ["", "0"])
    def test_is_silent_otherwise(self, monkeypatch, capsys, site, value: str) -> None:
        monkeypatch.setenv("VERL_PLUGINS_TRACE", value)
        site.plugin("watcher", HOOK.format(body="return 7"))
        manager.build({"watcher": {}}).hook.observe(run=None, batch=None)
        assert capsys.readouterr().out == ""
