"""Documentation says what the code does: signatures, included files, metrics, settings, links."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packages import EXAMPLE

import verl_plugins
from verl_plugins import hookspecs, testing
from verl_plugins.composition import manifest, recipe
from verl_plugins.services import Run
from verl_plugins.testing import check

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PLACEHOLDER = re.compile(
    r"\b(?:TODO|TBD|TBC|FIXME|XXX+|LOREM IPSUM|PLACEHOLDER)\b|<(?:number|value|measured?|fill[ _-]?in)>|\?\?\?+"
    r"|(?<![\w$`.=\"'])[A-Z]{2,}(?:_[A-Z0-9]{2,})+(?=\s*(?:s|ms|min|MB|GB|GiB|%|tokens|steps|\|)(?:\W|$))",
)
"""What stands for a number or a sentence that nobody has filled in; names of variables are written in backticks."""
OURS = [entry for entry in manifest.entries() if entry.dist and entry.dist.name == "verl-plugins"]
PLUGINS = {plugin.name: plugin for plugin in manifest.manifests(OURS)}
RECIPES = {item.name: item for item in recipe.recipes(manifest.folders(OURS))}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
LABS = sorted(name for name, item in RECIPES.items() if item.lab)
TRAINING = sorted(name for name, item in RECIPES.items() if item.kind == "training")

each_recipe = pytest.mark.parametrize("name", sorted(RECIPES))
each_training = pytest.mark.parametrize("name", TRAINING)
each_lab = pytest.mark.parametrize("name", LABS)


def page_of(name: str) -> str:
    return (ROOT / "docs" / "recipes" / f"{name}.md").read_text()


def section(text: str, heading: str) -> str:
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def signature(stage: str) -> str:
    function = getattr(hookspecs, stage)
    word = "async def" if inspect.iscoroutinefunction(function) else "def"
    return f"{word} {stage}{inspect.signature(function)}".replace("'", "")


@pytest.mark.parametrize("stage", hookspecs.STAGES)
def test_every_stage_is_documented_with_its_signature(stage):
    assert f"```python\n{signature(stage)}\n```" in (ROOT / "docs" / "plugins.md").read_text()


def test_stages_are_documented_in_the_order_they_run():
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs" / "plugins.md").read_text(), re.MULTILINE)
    assert tuple(heading for heading in headings if heading in hookspecs.STAGES) == hookspecs.STAGES


@each_page
def test_included_files_are_up_to_date(page):
    """A block after `<!-- examples/… -->` is the end of that file, or all of it."""
    for file, block in re.findall(r"<!-- (examples/\S+) -->\n```\w*\n(.*?)```", page.read_text(), re.DOTALL):
        text = (ROOT / file).read_text()
        assert text.endswith(block)
        assert block == text or block.startswith("["), f"{file} is included in part"


@pytest.mark.parametrize("page", ["README.md", "docs/plugins.md"])
def test_the_example_is_included(page):
    text = (ROOT / page).read_text()
    for file in ("src/rank_advantage/method.py", "pyproject.toml"):
        assert f"<!-- examples/third_party_plugin/{file} -->" in text


def test_every_recipe_has_a_page_and_every_page_a_recipe():
    assert {page.stem for page in (ROOT / "docs" / "recipes").glob("*.md")} == RECIPES.keys()


@each_recipe
def test_recipes_are_in_the_readme_with_paper_and_stages(name):
    (row,) = re.findall(rf"^\| \[`{name}`\].*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert RECIPES[name].arxiv in row
    for stage in RECIPES[name].stages:
        assert f"`{stage}`" in row


@each_training
def test_pages_name_every_setting_with_its_default(name):
    for plugin in own(name):
        has_defaults(page_of(name), rf"plugins\.{plugin}\.(\w+)", PLUGINS[plugin].defaults)


@each_lab
def test_pages_name_every_setting_of_the_lab_with_its_default(name):
    settings = manifest.lab_settings(RECIPES[name].lab)
    has_defaults(page_of(name), r"--set (\w+)=", {setting.name: setting.default for setting in settings})


def own(name):
    """The plugins that a recipe's page describes: the one of its name, or those of its paper."""
    paper = f"arXiv:{RECIPES[name].arxiv}"
    found = [name] if name in PLUGINS else [one for one in RECIPES[name].plugins if PLUGINS[one].paper == paper]
    assert found
    return found


def has_defaults(page, form, defaults):
    rows = {match[1]: match[2] for match in re.finditer(rf"^\| `{form}` \| (.*?) \|", page, re.MULTILINE)}
    assert rows.keys() == defaults.keys()
    for setting, default in defaults.items():
        shown = rows[setting].strip("`")
        if isinstance(default, (list, tuple)):
            assert shown == f"[{', '.join(map(str, default))}]"
        elif isinstance(default, (bool, str, type(None))):
            assert shown == {None: "none", True: "true", False: "false"}.get(default, default)
        else:
            assert float(shown) == default


@pytest.mark.parametrize("name", [name for name in LABS if name not in TRAINING])
def test_a_page_says_first_that_it_is_a_lab(name):
    first, second = (line for line in page_of(name).splitlines()[:3] if line)
    assert first.endswith("a lab, which trains nothing")
    assert second.startswith("**This is a lab: it does not train a policy, and ")


@each_lab
def test_pages_of_labs_say_how_to_run_them_and_which_claims_they_make(name):
    assert f"verl-plugins lab {name}" in page_of(name)
    assert "| claim | whose | expected | measured here |" in page_of(name)


@each_training
def test_pages_list_the_metrics_the_plugin_logs(name):
    listed = re.findall(r"^\|((?: ?`\w+`,?)+) \|", section(page_of(name), "Metrics"), re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(listed)))
    mine = [parsed(PLUGINS[plugin].target.split(":")[0]) for plugin in own(name)]
    methods = [
        node.module
        for source in mine
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("verl_plugins.")
    ]
    sources = [*mine, *map(parsed, methods)]
    strings = {node.value for each in sources for node in ast.walk(each) if isinstance(node, ast.Constant)}
    assert named
    assert named <= strings, f"not in the source: {named - strings}"
    in_logs = set().union(*map(logged, mine))
    assert in_logs <= named, f"not on the page: {in_logs - named}"


def parsed(module: str) -> ast.Module:
    return ast.parse(ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text())


def logged(source: ast.Module) -> set[str]:
    """Keys of the dicts that are handed to a `.log(…)`."""
    calls = [node for node in ast.walk(source) if isinstance(node, ast.Call) and node.args]
    dicts = [call.args[0] for call in calls if getattr(call.func, "attr", "") == "log"]
    return {key.value for found in dicts if isinstance(found, ast.Dict) for key in found.keys}


@each_recipe
def test_numbers_that_the_list_gives_are_on_the_page(name):
    """Rounded as the list has them; shares in percent are worked out from numbers there."""
    number = r"(?<![\w.])(\d+(?:\.\d+)?)"
    measured = [float(found) for found in re.findall(number, page_of(name))]
    for found in re.findall(number + r"(?! ?%|\w|\.\d)", RECIPES[name].status):
        half = 0.5 * 10 ** -len(found.partition(".")[2]) + 1e-9
        assert any(abs(one - float(found)) <= half for one in measured), found


@each_training
def test_pages_say_what_becomes_of_stale_rollouts(name):
    assert re.search(r"^- \*\*Stale rollouts\.\*\* \S.*\.$", section(page_of(name), "Caveats"), re.MULTILINE)


@each_recipe
def test_pages_keep_the_papers_figures_apart_from_measurements(name):
    headings = re.findall(r"^## (.+)$", page_of(name), re.MULTILINE)
    training = (
        ("What it needs", "Run and combine", "Metrics") if name in TRAINING else ("Run", "Why it is no method of RL")
    )
    for heading in ("Idea", "Settings", "Caveats", "Links", *training):
        assert heading in headings
    assert headings.index("Measured here") == headings.index("What the paper reports") + 1


def test_the_code_about_checking_a_plugin_runs(site, tmp_path):
    shutil.copytree(EXAMPLE / "src" / "rank_advantage", site.path / "rank_advantage")
    from rank_advantage.method import RankAdvantage, centred_ranks

    text = section((ROOT / "docs" / "plugins.md").read_text(), "Check your plugin")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {name: getattr(verl_plugins, name) for name in ("Batch", "Groups")}
    names |= {"RankAdvantage": RankAdvantage, "centred_ranks": centred_ranks, "torch": torch, "pytest": pytest}
    for block in blocks[2:]:
        exec(block, names)
    golden = tmp_path / "golden.json"
    golden.write_text(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    testing.check_plugin(RankAdvantage, golden=golden, replay=names["replay"])


def test_fields_of_a_batch_for_tests_are_called_as_the_table_says():
    """Everything of the table about `Batch.from_tensors` is given under its name there and read under the other."""
    table = section((ROOT / "docs" / "plugins.md").read_text(), "Check your plugin").split("| read as | given as |")[1]
    given = {
        "rm_scores": torch.tensor([[0.0, 1.0]]),
        "response_mask": torch.ones(1, 2),
        "acc": torch.tensor([0.0]),
        "response_lengths": torch.tensor([2]),
        "ref_log_prob": torch.zeros(1, 2),
        "budget": 5,
        "__max_tokens__": torch.tensor([3]),
        "extra_info": [{"solution": "because", "level": 4}],
        "session": [7],
        "turn": [1],
    }
    assert all(f"`{name}" in table for name in given)
    batch = verl_plugins.Batch.from_tensors(uid=["3-1-0"], **given)
    assert (batch.scores.tolist(), batch.correct.tolist(), batch.lengths.tolist()) == ([1.0], [False], [2])
    assert (batch.budgets.tolist(), batch.solution, list(batch.extra("level"))) == ([3], ["because"], [4])
    assert (batch.session.tolist(), batch.turn.tolist(), batch.ref_log_probs.shape) == ([7], [1], (1, 2))


@each_page
def test_relative_links_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
            }


@each_page
def test_nothing_is_left_to_fill_in(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    assert PLACEHOLDER.findall(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "| a step | STEP_CPU s |",
        "takes FIRST_VLLM s",
        "about MEM_PEAK GiB",
        "TODO",
        "it gains XXX points",
        "<number> s",
        "??? s",
    ],
)
def test_placeholders_are_seen(text):
    assert PLACEHOLDER.search(text)


@pytest.mark.parametrize(
    "text", ["`RAY_ADDRESS` | set", "set VERL_PLUGINS_CACHE to a folder", "GPU | 80 GB", "AIME 2024"]
)
def test_names_are_no_placeholders(text):
    assert not PLACEHOLDER.search(text)


@pytest.mark.parametrize("module", [verl_plugins, testing], ids=["verl_plugins", "testing"])
def test_public_names_are_listed(module):
    listed = set(re.findall(r"`([\w.]+)`", (ROOT / "docs" / "api.md").read_text()))
    assert set(module.__all__) <= listed


def test_laws_are_listed():
    table = section((ROOT / "docs" / "plugins.md").read_text(), "Check your plugin")
    laws = table.split("| law | what must hold |")[1].split("\n\n")[0]
    rows = "".join(re.findall(r"^\| (`.*?`) \|", laws, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", rows)) == {*check.CLASS_LAWS, *check.CALL_LAWS, *check.VARIANTS}


def test_members_of_run_are_listed():
    table = section((ROOT / "docs" / "plugins.md").read_text(), "What a hook sees").split("### Run")[1]
    members = [name for name in (*vars(Run), *Run.__annotations__) if not name.startswith("_")]
    for name in members:
        assert re.search(rf"`{name}\b|run\.{name}\b", table), name


def test_commands_in_the_docs_name_installed_recipes_and_presets():
    presets = {preset.name for preset in recipe.presets(manifest.folders(OURS))}
    known = RECIPES.keys() | {"rank_advantage", "my_method", "RECIPE[+RECIPE…]"}
    for page in PAGES:
        labs = re.findall(r"verl-plugins lab (\w+)", page.read_text())
        assert {name for name in labs if name != "NAME"} <= {*LABS}
        for line in re.findall(r"verl-plugins run (.+)", page.read_text()):
            words = line.split()
            assert words[0] in known or set(words[0].split("+")) <= known or words[0].startswith("`"), line
            if "--preset" in words:
                assert words[words.index("--preset") + 1].strip("`") in presets, line


def test_torch_pin_of_the_makefile_is_that_of_the_extra():
    (pin,) = re.findall(r"^TORCH := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f'cpu = ["{pin}"]' in (ROOT / "pyproject.toml").read_text()


def test_mkdocs_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "recipes" / "vade" / "index.html").exists()
