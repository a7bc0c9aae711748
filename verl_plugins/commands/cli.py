"""The command `verl-plugins`: each sub-command imports what it needs when it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from verl_plugins.data.command import app as data
from verl_plugins.errors import CompositionError, PluginError, printable

LAUNCH = "verl_plugins.bridge.launch:launch"
DEMO = "verl_plugins.cpu.demo:demo"

Json = Annotated[bool, typer.Option("--json", help="Print plain data instead of tables.")]
Out = Annotated[Optional[Path], typer.Option(help="Folder of the run; a run found there is resumed.")]  # noqa: UP045
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE[+RECIPE…]", help="One recipe, or several that fit together.")
]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(metavar="[key=value | +key=value | ~key]…", help="Settings of verl or of plugins, as in Hydra."),
]
Preset = Annotated[Optional[str], typer.Option(help="Hardware, model and data, as in --preset cpu.")]  # noqa: UP045
Steps = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Train only so many steps, without validation: a quick look whether it trains."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Compose, check, print what differs from verl's defaults, stop.")
]
Full = Annotated[bool, typer.Option("--full", help="With --dry-run: print every key of the configuration.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the output of every process.")]

app = typer.Typer(
    help="Recent RL methods for language models, inside verl's own trainer.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data, name="data")


def main() -> None:
    """The console script: one line for an error of composition or data (exit code 2), 130 when interrupted."""
    try:
        app()
    except PluginError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(2)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"verl-plugins {version('verl-plugins')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Recent RL methods for language models, inside verl's own trainer."""


@app.command("list")
def list_(
    long: Annotated[bool, typer.Option("--long", help="Papers, stages, owners; plugins and presets, too.")] = False,
    as_json: Json = False,
) -> None:
    """Which recipe you want: by the problem it treats, with what was measured."""
    from verl_plugins.commands import display
    from verl_plugins.composition import manifest, recipe

    installed = manifest.entries()
    folders = manifest.folders(installed)
    described = installed if long or as_json else manifest.of_others(installed, display.OWN_DISTRIBUTION)
    data = display.overview(recipe.recipes(folders), recipe.presets(folders), manifest.manifests(described), folders)
    if as_json:
        _print_json(data)
    elif long:
        display.print_overview(data)
    else:
        display.print_choice(data)


@app.command()
def show(name: str, as_json: Json = False) -> None:
    """What a recipe (or several, A+B), plugin or preset does: idea, settings, the authors' settings, needs, stages."""
    from verl_plugins.commands import display
    from verl_plugins.composition import manifest, recipe

    installed = manifest.entries()
    folders = manifest.folders(installed)
    plugins = manifest.manifests(installed)
    items = display.details(name, recipe.recipes(folders), recipe.presets(folders), plugins, folders)
    if as_json:
        _print_json([display.plain(item, items) for item in items])
    else:
        display.print_details(items)


@app.command(context_settings={"ignore_unknown_options": True})
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    preset: Preset = None,
    out: Out = None,
    steps: Steps = None,
    dry_run: DryRun = False,
    full: Full = False,
    verbose: Verbose = False,
) -> None:
    """Train with one recipe, or with several that fit together."""
    from verl_plugins.composition.compose import compose
    from verl_plugins.composition.look import look
    from verl_plugins.composition.needs import check

    composed = compose(recipe, preset, [*_only(steps, overrides or ()), *(overrides or ())])
    plugins = check(composed)
    seen = look(composed, plugins, out)
    if dry_run:
        from verl_plugins.composition.plan import plan

        typer.echo(plan(composed, plugins, seen, full=full), nl=False)
    else:
        _start(LAUNCH, composed, out=out or _folder(composed.recipe), verbose=verbose, seen=seen)


@app.command()
def demo(
    out: Out = None,
    preset: Annotated[str, typer.Option(help="cpu, a tiny model, or smollm2, a real one.")] = "cpu",
) -> None:
    """Train a small model on this machine's CPU and show what happened."""
    _start(DEMO, out=out or _folder("demo"), preset=preset)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="[LABEL=]FOLDER…", help="Run folders.")],
    out: Annotated[Path, typer.Option(help="Folder for curves.png and index.html.")] = Path("comparison"),
    metric: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="KEY", help="Draw this metric, too; may be repeated."),
    ] = None,
    by: Annotated[
        str, typer.Option(metavar="steps|tokens", help="Draw over steps, or over tokens generated.")
    ] = "steps",
) -> None:
    """Draw accuracy, reward, entropy and length of several runs; seeds of one configuration become one band."""
    from verl_plugins.commands.compare import compare as draw

    for file in draw(runs, out, metric or (), by):
        typer.echo(file)


@app.command()
def study(
    variants: Annotated[
        list[str],
        typer.Argument(
            metavar="'RECIPE [key=value]…'… | FILE.yaml [VARIANT]…", help="What to compare, baseline first."
        ),
    ],
    preset: Preset = None,
    out: Annotated[Path, typer.Option(help="Folder of the study; what is finished in it is not repeated.")] = Path(
        "study"
    ),
    seeds: Annotated[Optional[int], typer.Option(min=1, help="Trainings of each variant. [default: 5]")] = None,  # noqa: UP045
    steps: Annotated[Optional[int], typer.Option(min=1, help="Of each training. [default: the preset's]")] = None,  # noqa: UP045
    budget: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="tokens|steps", help="Compare at equal tokens or equal steps. [default: tokens]"),
    ] = None,
    baseline: Annotated[Optional[str], typer.Option(help="Another variant than the first.")] = None,  # noqa: UP045
    common: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of all variants; may be repeated."),
    ] = None,
    column: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="KEY", help="A metric as a column, mean over all steps; may be repeated."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trainings at the same time on this machine.")] = 1,
    command: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Hand each training to a scheduler, as in 'sbatch --wrap={command}'; also {name}, {folder}."),
    ] = None,
) -> None:
    """Train variants with several seeds and compare them at equal cost, paired by seed, with intervals."""
    from verl_plugins.commands.study import command as of_study
    from verl_plugins.commands.study.design import from_options

    options = {"preset": preset, "seeds": seeds, "steps": steps, "budget": budget, "baseline": baseline}
    what = from_options(variants, common or (), column or (), **options)
    _start(f"{of_study.__name__}:study", what, out, jobs, command)


@app.command(context_settings={"ignore_unknown_options": True})
def pairs(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe, or `all`.")],
    overrides: Overrides = None,
    preset: Preset = None,
    as_json: Json = False,
) -> None:
    """What becomes of a recipe beside each other one: whether and where they meet, and why not."""
    from verl_plugins.commands import pairs as of

    found = of.pairs(None if recipe == "all" else recipe, preset or "cpu", overrides or ())
    if as_json:
        _print_json([{"state": pair.state, **vars(pair)} for pair in found])
    else:
        of.print_pairs(recipe, found)


@app.command()
def lab(
    name: Annotated[str, typer.Argument(help="A recipe that has a lab: `list` names them.")],
    given: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the lab; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    out: Annotated[Optional[Path], typer.Option(help="Folder for NAME.png and NAME.json.")] = None,  # noqa: UP045
) -> None:
    """Measure a paper's own claim on this CPU, without training a policy: 1 if a claim does not hold."""
    _start("verl_plugins.commands.lab:lab", name, given or (), seed=seed, out=out)


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="An installed plugin, yours or ours.")],
    given: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the plugin; may be repeated."),
    ] = None,
    excused: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--except", metavar="LAW", help="The method breaks it on purpose; may be repeated."),
    ] = None,
) -> None:
    """Play a few invented steps with a plugin in this process, several ways, without a training: 1 if a law breaks."""
    _start("verl_plugins.testing.command:check", name, given or (), excused or ())


@app.command()
def score(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Answers, as .jsonl, .json or .parquet, or a dump.")],
    text: Annotated[Optional[str], typer.Option(metavar="COLUMN", help="The responses.")] = None,  # noqa: UP045
    truth: Annotated[Optional[str], typer.Option(metavar="COLUMN", help="The ground truth.")] = None,  # noqa: UP045
    rows: Annotated[int, typer.Option(min=0, help="How many rows to show that are worth a look.")] = 20,
    workers: Annotated[int, typer.Option(min=1, help="Processes that compare.")] = 4,
    deadline: Annotated[float, typer.Option(min=0.01, help="Seconds a comparison may take.")] = 5.0,
    as_json: Json = False,
) -> None:
    """Score a file of answers as training does: verdicts, reasons, and where plain Math-Verify says otherwise."""
    from rich.console import Console

    from verl_plugins.data.score import print_scores
    from verl_plugins.data.score import score as score_file

    scores = score_file(file, text, truth, workers, deadline)
    if as_json:
        _print_json(scores.plain())
    else:
        print_scores(scores, Console(), rows)


@app.command(context_settings={"ignore_unknown_options": True})
def doctor(
    recipe: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="[RECIPE[+RECIPE…]]", help="Look at this run too: its reward, model and data."),
    ] = None,
    overrides: Overrides = None,
    preset: Preset = None,
    ray: Annotated[bool, typer.Option("--ray", help="Start a worker of each kind on each node and compare.")] = False,
    address: Annotated[Optional[str], typer.Option(help="With --ray: a running cluster.")] = None,  # noqa: UP045
    clean: Annotated[bool, typer.Option("--clean", help="Remove temporary folders of killed runs, then stop.")] = False,
    as_json: Json = False,
) -> None:
    """What works on this machine, and the command that mends what does not."""
    from itertools import chain

    from verl_plugins.commands.doctor import BROKEN, examine, examine_run, plain, print_report
    from verl_plugins.composition.scratch import clean as clean_up

    if clean:
        typer.echo(f"removed {len(clean_up())} temporary folders of killed runs")
        return
    findings = chain(examine_run(recipe, preset, overrides or ()) if recipe else (), examine(ray, address))
    if as_json:
        listed = [plain(finding) for finding in findings]
        _print_json(listed)
        sys.exit(int(any(one["state"] == BROKEN for one in listed)))
    sys.exit(print_report(findings))


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Of the plugin, its recipe and its package, as in my_method.")],
    stage: Annotated[str, typer.Option(help="The stage it takes part in, as in policy_loss.")] = "estimate_advantage",
    folder: Annotated[Path, typer.Option("--dir", help="Where the package is written.")] = Path("."),
) -> None:
    """Write a package of your own, one plugin and one recipe: it trains and passes its tests as it is."""
    from verl_plugins.commands.scaffold import create

    for file in create(name, stage, folder):
        typer.echo(file)
    typer.echo(f"\npip install -e {folder / name}\nverl-plugins run {name} --preset cpu")


def _only(steps: int | None, overrides: Sequence[str]) -> list[str]:
    """What `--steps` stands for; the command line may say otherwise, but not how many."""
    key = "trainer.total_training_steps"
    if steps is None:
        return []
    if said := [one for one in overrides if one.lstrip("+").startswith(f"{key}=")]:
        raise CompositionError(f"--steps {steps} and {said[0]}: give one of the two")
    return [f"{key}={steps}", "trainer.val_before_train=false", "trainer.test_freq=-1"]


def _start(target: str, *args: Any, **options: Any) -> None:
    """Import `module:function`, call it, and exit with the code it returns."""
    from importlib import import_module

    module, _, name = target.partition(":")
    function: Callable[..., int] = getattr(import_module(module), name)
    try:
        code = function(*args, **options)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _folder(name: str) -> Path:
    from datetime import datetime

    return Path("outputs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _print_json(data: Any) -> None:
    import json

    typer.echo(json.dumps(data, indent=1, default=str))


if __name__ == "__main__":
    main()
