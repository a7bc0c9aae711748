"""Agent loops and tools: what is named is there, and what is given is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from verl_plugins.composition.compose import compose
from verl_plugins.composition.look.agent import FUNCTIONS, LOOP, LOOPS, TOOLS, look_at_agent
from verl_plugins.errors import CompositionError


def looked(*overrides: str, named_by_rows: bool = False) -> dict[str, str]:
    """Paths as they are entered."""
    config = compose("grpo", "cpu", overrides).config
    look_at_agent(config, named_by_rows)
    rollout = config.actor_rollout_ref.rollout
    return {"loops": rollout.agent.agent_loop_config_path, "functions": rollout.multi_turn.function_tool_path}


def refused(sentence, *overrides: str, parts: tuple[str, ...], named_by_rows: bool = False) -> None:
    with pytest.raises(CompositionError) as error:
        looked(*overrides, named_by_rows=named_by_rows)
    sentence(error.value, *parts)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    (tmp_path / "tools.py").write_text("def check(answer: str) -> str: ...\n")
    return tmp_path / "tools.py"


@pytest.mark.parametrize("key", [FUNCTIONS, TOOLS, LOOPS])
def test_a_file_that_is_not_there(tmp_path: Path, sentence, key: str) -> None:
    for path in (tmp_path / "none.py", tmp_path):
        refused(sentence, f"{key}={path}", f"{LOOP}=tool_agent", parts=(f"{key}: there is no file {path}",))


@pytest.mark.parametrize(
    ("key", "text", "part"),
    [
        (FUNCTIONS, "def broken(:\n", "line 1, is not Python"),
        (TOOLS, "tools: [", "is not YAML"),
        (LOOPS, "a: {", "is not YAML"),
        (LOOPS, "name: mine\n", "must be a list"),
        (LOOPS, "- name: mine\n", "name and _target_"),
        (LOOPS, "- mine\n", "name and _target_"),
    ],
)
def test_a_file_that_is_something_else(tmp_path: Path, sentence, key: str, text: str, part: str) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    refused(sentence, f"{key}={file}", f"{LOOP}=tool_agent", parts=(key, str(file), part))


def test_tools_without_a_loop_that_calls_them(tools: Path, sentence) -> None:
    refused(sentence, f"{FUNCTIONS}={tools}", parts=(FUNCTIONS, "calls no tools", f"{LOOP}=tool_agent"))
    looked(f"{FUNCTIONS}={tools}", f"{LOOP}=tool_agent")
    looked(f"{FUNCTIONS}={tools}", named_by_rows=True)


@pytest.mark.parametrize(
    ("name", "meant"), [("tool_agnt", "tool_agent"), ("single_turn", "single_turn_agent"), ("mime", "mine")]
)
def test_a_misspelt_loop(tmp_path: Path, sentence, name: str, meant: str) -> None:
    loops = tmp_path / "loops.yaml"
    loops.write_text("- {name: mine, _target_: package.Mine}\n")
    refused(sentence, f"{LOOPS}={loops}", f"{LOOP}={name}", parts=(LOOP, f"did you mean {meant!r}?"))
    looked(f"{LOOPS}={loops}", f"{LOOP}={meant}")


def test_a_loop_that_a_module_registers_is_let_through() -> None:
    looked(f"{LOOP}=react")


def test_paths_hold_in_every_process(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tools.parent)
    assert looked(f"{FUNCTIONS}=tools.py", f"{LOOP}=tool_agent")["functions"] == str(tools)
