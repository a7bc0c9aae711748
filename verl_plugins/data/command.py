"""`verl-plugins data`: its commands. What a command needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from verl_plugins.errors import DataError, nearest

Column = Optional[str]  # noqa: UP045
Text = Optional[str]  # noqa: UP045
Keep = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(metavar="COLUMN", help="A column to keep in extra_info; may be repeated."),
]
DataSource = Annotated[
    Text, typer.Option(metavar="NAME", help="Name of the data in metrics; else the file's own, or own/<shape>.")
]
Unlabelled = Annotated[
    bool, typer.Option("--unlabelled", help="Keep questions without answer, for recipes that need none.")
]
DropDuplicates = Annotated[bool, typer.Option("--drop-duplicates", help="Keep the first row of each question.")]
Set = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the tasks, or of one: task.key=value; repeatable."),
]

KINDS, LONG_TEXTS = ("hashing", "folder", "http", "callable"), ("windows", "tail")

app = typer.Typer(help="Data of your own.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def data() -> None:
    """Data of your own."""


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to convert.")],
    to: Annotated[Path, typer.Option("--to", metavar="OUT", help="The parquet file to write.")],
    val_to: Annotated[Optional[Path], typer.Option(help="Another one, for rows that are held out.")] = None,  # noqa: UP045
    val_fraction: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="How many are, about; a question always falls on the same side. [default: 0.1]"),
    ] = None,
    shape: Annotated[Text, typer.Option(help="gsm8k, math, dapo or plain, where the columns do not tell.")] = None,
    question: Annotated[Column, typer.Option(metavar="COLUMN", help="What is asked; a.b is the key b in a.")] = None,
    answer: Annotated[Column, typer.Option(metavar="COLUMN", help="The answer.")] = None,
    solution: Annotated[Column, typer.Option(metavar="COLUMN", help="The worked solution.")] = None,
    id: Annotated[Column, typer.Option(metavar="COLUMN", help="A name of each prompt; else a hash of it.")] = None,
    keep: Keep = None,
    data_source: DataSource = None,
    system: Annotated[Text, typer.Option(help="A system message before each question.")] = None,
    suffix: Annotated[Text, typer.Option(help="A last line for each question.")] = None,
    skip_unanswered: Annotated[bool, typer.Option("--skip-unanswered", help="Leave out rows without answer.")] = False,
    unlabelled: Unlabelled = False,
    drop_duplicates: DropDuplicates = False,
) -> None:
    """Turn a file of questions with answers into the parquet that training reads.

    FILE is .jsonl, .json (a list of objects) or .parquet, the first two also .gz.

    Shapes: GSM8K (question, answer with ####), MATH (problem, solution with a boxed answer), DAPO (prompt,
    reward_model), or plain columns of questions and answers. Where a row has no answer, nothing is written.
    """
    from rich.console import Console

    from verl_plugins.data.convert import Options
    from verl_plugins.data.convert import convert as convert_file
    from verl_plugins.data.report import print_report

    if val_fraction is not None and val_to is None:
        raise DataError(f"--val-fraction {val_fraction} needs --val-to, the file for the rows that are held out")
    options = Options(
        shape=shape,
        question=question,
        answer=answer,
        solution=solution,
        id=id,
        keep=tuple(keep or ()),
        data_source=data_source,
        system=system,
        suffix=suffix,
        val_to=val_to,
        val_fraction=Options.val_fraction if val_fraction is None else val_fraction,
        skip_unanswered=skip_unanswered,
        unlabelled=unlabelled,
        drop_duplicates=drop_duplicates,
    )
    print_report(convert_file(file, to, options, Console(stderr=True)), Console())


@app.command()
def gym(
    tasks: Annotated[str, typer.Argument(metavar="TASK[=WEIGHT][,TASK…]", help="Names of reasoning-gym's tasks.")],
    to: Annotated[Path, typer.Option("--to", metavar="OUT", help="The parquet file to write.")],
    rows: Annotated[int, typer.Option(help="Rows for training.", min=1)] = 1000,
    val_to: Annotated[Optional[Path], typer.Option(help="Another one, for rows that are held out.")] = None,  # noqa: UP045
    val_rows: Annotated[Optional[int], typer.Option(help="How many those are. [default: an eighth]")] = None,  # noqa: UP045
    settings: Set = None,
    seed: Annotated[int, typer.Option(help="Seed of the questions.")] = 0,
    system: Annotated[Text, typer.Option(help="A system message before each question.")] = None,
    suffix: Annotated[Text, typer.Option(help="A last line for each question; '' for none.")] = None,
) -> None:
    """Make data of reasoning-gym's tasks, for the plugin reasoning_gym: a data_source for each task.

    Example: verl-plugins data gym chain_sum,countdown=2 --rows 2000 --set chain_sum.max_terms=3 --to train.parquet
    """
    from rich.console import Console
    from rich.table import Table

    from verl_plugins.data.gym import SUFFIX, Options, parse_settings, parse_tasks, write

    weights = parse_tasks(tasks)
    options = Options(
        rows=rows,
        val_to=val_to,
        val_rows=val_rows,
        seed=seed,
        settings=parse_settings(settings or (), list(weights)),
        system=system,
        suffix=SUFFIX if suffix is None else suffix,
    )
    written = write(weights, to, options, Console(stderr=True))
    table = Table(title=f"{to}{f' and {val_to}' if val_to else ''}", title_justify="left")
    for heading in ("task", "rows", "held out", "longest question (characters)"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for one in written:
        table.add_row(one.task, *map(str, (one.train, one.val, one.longest_question)))
    Console().print(table)
    print(f"first question:\n{written[0].example}\nanswer: {written[0].answer}")


@app.command()
def anchors(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A parquet file in verl's schema.")],
    to: Annotated[Path, typer.Option("--to", metavar="OUT", help="The parquet file to write.")],
    count: Annotated[int, typer.Option("--anchors", help="How many anchors.", min=1)] = 16,
    embedder: Annotated[str, typer.Option(help="hashing, folder, http or callable.")] = "hashing",
    source: Annotated[str, typer.Option(help="The embedder's folder, address or module:function.")] = "",
    long_text: Annotated[str, typer.Option(help="Of texts a folder's model cannot read at once: windows or tail.")] = (
        "windows"
    ),
    val: Annotated[Optional[Path], typer.Option(help="Held-out prompts, which go to the same anchors.")] = None,  # noqa: UP045
    val_to: Annotated[Optional[Path], typer.Option(help="The parquet file to write of them.")] = None,  # noqa: UP045
    compare: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FOLDER", help="A model's folder: how alike is its map of the anchors (recipe ecr)."),
    ] = None,
    column: Annotated[str, typer.Option(help="Name of the new column.")] = "anchor_id",
    seed: Annotated[int, typer.Option(help="Seed of the first anchors.")] = 0,
) -> None:
    """Embed and cluster prompts, and write the number of each prompt's anchor into a column, for the recipe ecr.

    Example: verl-plugins data anchors train.parquet --to with_anchors.parquet --embedder folder --source models/e5
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from verl_plugins.data.anchors import Options, write
    from verl_plugins.reward.embedding import embedder as made

    kinds = {"--embedder": (embedder, KINDS), "--long-text": (long_text, LONG_TEXTS)}
    for flag, (given, known) in kinds.items():
        if given not in known:
            raise DataError(f"{flag} is {given!r}{nearest(given, known)}")
    compared = made("folder", str(compare), long_text) if compare else None
    options = Options(anchors=count, seed=seed, column=column, val=val, val_to=val_to)
    report = write(file, to, made(embedder, source, long_text), options, compared)
    table = Table(title=str(to), title_justify="left")
    for heading in ("anchor", "prompts", *(["held out"] if report.val_counts else []), "nearest prompt"):
        table.add_column(heading, justify="left" if heading == "nearest prompt" else "right")
    for anchor, (number, example) in enumerate(zip(report.counts, report.examples, strict=True)):
        held_out = [str(report.val_counts[anchor])] if report.val_counts else []
        table.add_row(str(anchor), str(number), *held_out, escape(example.replace("\n", " ")[:60]))
    Console().print(table)
    if compare:
        found = "cannot be told" if report.consistency is None else f"{report.consistency:.3f}"
        print(f"geometry consistency with {compare}: {found}")
