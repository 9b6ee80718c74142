"""The commands of the console script and their options."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peftlab.cli.errors import Broken, UserError, blamed

# typer carries click inside or depends on it, as its version has it; the class of its complaints is found from one it exports.
Complaint = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Adapt a pretrained model to a task with few parameters, and say what came of it.",
)

Method = Annotated[str, typer.Option(help="A name from `peftlab methods`.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="An option of the method (or of peftlab.wrap), such as r=16; may be repeated."),
]
Targets = Annotated[list[str] | None, typer.Option("--target", metavar="PATTERN", help="Where the method sits, by name or glob; may be repeated.")]
Model = Annotated[Path | None, typer.Option(metavar="DIR", help="A local Hugging Face model folder. Default: all-MiniLM-L6-v2.")]
Data = Annotated[Path | None, typer.Option(metavar="FILE", help="A csv or jsonl file. Default: Rotten Tomatoes sentences.")]
Task = Annotated[str, typer.Option(help="classify (a text and a label column) or lm (a text column).")]
TextColumn = Annotated[str, typer.Option(help="Column of the text.")]
LabelColumn = Annotated[str, typer.Option(help="Column of the class.")]
PromptColumn = Annotated[str | None, typer.Option(help="lm: column that the model reads before the text and is not scored on.")]
Train = Annotated[int, typer.Option(help="Training examples, at most.")]
Val = Annotated[int, typer.Option(help="Validation examples, at most.")]
Test = Annotated[int, typer.Option(help="Test examples, at most.")]
MaxLength = Annotated[int, typer.Option(help="Tokens of an example that are used.")]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the training data.")]
Batch = Annotated[int, typer.Option(min=1, help="Examples a step.")]
Evals = Annotated[int, typer.Option(min=1, help="Validations an epoch.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or mps.")]


@app.command()
def finetune(
    method: Method = "lora",
    set_: Sets = None,
    target: Targets = None,
    model: Model = None,
    data: Data = None,
    task: Task = "classify",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the adapter, the loss curve and the report go.")] = Path("peftlab-out"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in --out.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away the unfinished run in --out.")] = False,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Of the start values, the order of the data and dropout.")] = 0,
    lr: Annotated[float | None, typer.Option(help="Learning rate of AdamW. Default: a usual one for the method.")] = None,
    epochs: Epochs = 2,
    batch: Batch = 16,
    evals: Evals = 2,
    max_length: MaxLength = 40,
    train: Train = 2000,
    val: Val = 500,
    test: Test = 1000,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    prompt_column: PromptColumn = None,
) -> int:
    """Adapt a model to a task: plan, train, check, test, save one adapter file, reload it, merge it, draw the loss."""
    from peftlab.cli import finetune as job
    from peftlab.cli.work import Options, parse_set

    if resume and restart:
        raise UserError("--resume and --restart exclude each other")
    where = dict(model=model, data=data, task=task, text_column=text_column, label_column=label_column, prompt_column=prompt_column)
    sizes = dict(train=train, val=val, test=test, max_length=max_length)
    options = Options(method, parse_set(set_ or [], method), target or [], **where, **sizes, device=device, seed=seed)
    settings = {"epochs": epochs, "batch": batch, "evals": evals} | ({} if lr is None else {"lr": positive("--lr", lr)})
    return job.finetune(options, settings, job.Output(out, resume, restart), console())


@app.command()
def compare(
    method: Annotated[list[str] | None, typer.Option(help="A method to compare; may be repeated. Default: all that fit.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds (0, 1, ...).")] = 3,
    lr: Annotated[list[float] | None, typer.Option(help="A learning rate to try, the reference apart; may be repeated. Default: three a method.")] = None,
    reference: Annotated[bool, typer.Option(help="Train full fine-tuning as a reference point too.")] = True,
    model: Model = None,
    data: Data = None,
    task: Task = "classify",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the table, the figure and the raw numbers go.")] = Path("peftlab-compare"),
    device: Device = "cpu",
    epochs: Epochs = 2,
    batch: Batch = 16,
    evals: Evals = 2,
    max_length: MaxLength = 40,
    train: Train = 2000,
    val: Val = 500,
    test: Test = 1000,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    prompt_column: PromptColumn = None,
) -> int:
    """Compare methods on the same data and seeds: accuracy with its spread, trainable parameters, step time, peak memory."""
    from peftlab.cli import compare as job
    from peftlab.cli.work import Options

    where = dict(model=model, data=data, task=task, text_column=text_column, label_column=label_column, prompt_column=prompt_column)
    options = Options(**where, train=train, val=val, test=test, max_length=max_length, device=device)
    settings = {"epochs": epochs, "batch": batch, "evals": evals}
    request = job.Request(method or None, list(range(seeds)), [positive("--lr", v) for v in lr or ()], settings, reference)
    return job.compare(options, request, out, console())


@app.command()
def methods(family: Annotated[str | None, typer.Option(help="Only this family.")] = None) -> int:
    """List the methods."""
    import peftlab

    with blamed("--family"):
        rows = peftlab.methods(family)
    table = Table("name", "family", "what it is", "trains, a site", "paper")
    for row in rows:
        table.add_row(*(escape(text) for text in (row.name, row.family, row.summary, row.trains, row.paper)))
    console().print(table)
    return 0


@app.command()
def plan(
    method: Method = "lora",
    set_: Sets = None,
    target: Targets = None,
    model: Model = None,
    task: Annotated[str, typer.Option(help="classify (the bare model) or lm (with its language-model head).")] = "classify",
) -> int:
    """Show where a method would sit and what it would train; reads no weights."""
    import peftlab
    from peftlab.cli.tasks import default_folder, skeleton
    from peftlab.cli.work import parse_set

    if task not in ("classify", "lm"):
        raise UserError(f"--task {task}: classify or lm")
    hyper = parse_set(set_ or [], method) | ({"targets": target} if target else {})
    net = skeleton(model if model is not None else default_folder(), task)
    with blamed(f"--method {method}"):
        console().print(escape(repr(peftlab.plan(net, method, **hyper))), highlight=False, soft_wrap=True)
    return 0


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="An adapter file.")],
    tensors: Annotated[bool, typer.Option(help="List every tensor.")] = False,
) -> int:
    """Say what is in an adapter file: methods, options, places, sizes; every tensor is checked against its checksum."""
    from peftlab.cli.inspect import inspect as job

    return job(file, tensors, console())


@app.command()
def merge(
    model: Annotated[Path, typer.Option(metavar="DIR", help="The Hugging Face model folder the adapter was trained on.")],
    adapter: Annotated[Path, typer.Option(metavar="FILE", help="The adapter file.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder for the merged model.")],
) -> int:
    """Fold an adapter file into a model's safetensors shards, tensor by tensor, without building the model."""
    from tqdm import tqdm

    from peftlab.formats.merge_files import merge_files

    screen = console()
    with blamed("merge"), tqdm(unit="layer", dynamic_ncols=True, file=screen.file) as bar:

        def progress(done: int, total: int, key: str) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = merge_files(model, adapter, out, progress=progress)
    screen.print(escape(repr(found)), highlight=False, soft_wrap=True)
    return 0


def positive(option: str, value: float) -> float:
    """A finite learning rate above zero."""
    if not 0 < value < float("inf"):
        raise UserError(f"{option} {value}: must be above 0")
    return value


def console() -> Console:
    """Standard output; wide where it is not a terminal, so that files and pipes get whole lines."""
    found = Console()
    return found if found.is_terminal else Console(width=160)


def run(args: list[str] | None = None) -> int:
    """Parse and run a command; every foreseen fault is one line on standard error and an exit status."""
    try:
        return app(args=args, standalone_mode=False) or 0
    except typer.Exit as stop:
        return stop.exit_code
    except Complaint as error:
        sys.stderr.write(f"peftlab: {error.format_message()}\n")
        return 2
    except UserError as error:
        sys.stderr.write(f"peftlab: {' '.join(str(error).split())}\n")
        return 2
    except Broken as error:
        sys.stderr.write(f"peftlab: {error}\n")
        return 1
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("peftlab: interrupted\n")
        return 130
