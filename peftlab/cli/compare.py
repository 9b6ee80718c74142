"""`peftlab compare`: many methods on the same data and seeds, with reference points, as a table and a figure."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

import peftlab
from peftlab.cli import draw
from peftlab.cli.baselines import bag_of_words
from peftlab.cli.errors import Broken, Diverged, UserError
from peftlab.cli.finetune import before
from peftlab.cli.loop import BEST, Loop, Settings
from peftlab.cli.tasks import Classify, quiet
from peftlab.cli.work import Options, PeakMemory, Work, attach, prepare, rate, wrap_options

FULL = "full fine-tuning"
AROUND = (1 / 3, 1.0, 3.0)  # learning rates that are tried, times the method's usual one


@dataclass
class Request:
    """What to compare: methods (None: all that fit), seeds, learning rates (empty: around each method's usual one)."""

    methods: list[str] | None
    seeds: list[int]
    rates: list[float]
    settings: dict
    reference: bool = True


def candidates(work: Work, options: Options, asked: list[str] | None) -> tuple[list[str], list[tuple[str, str]]]:
    """(methods that fit the model, methods left out with the reason)."""
    known = [entry.name for entry in peftlab.methods(aliases=asked is not None)]
    for name in asked or []:
        if name not in known:
            peftlab.plan(torch.nn.Linear(2, 2), name)  # raises with the nearest name
    model = work.task.load()
    fit, left = [], []
    for name in asked or [n for n in known if n != "full"]:
        try:
            peftlab.plan(model, name, **wrap_options(work.task, replace(options, method=name, hyper={})))
        except (ValueError, TypeError) as error:
            left.append((name, str(error)))
        else:
            fit.append(name)
    if asked and left:
        raise UserError(f"--method {left[0][0]}: {left[0][1]}")
    return fit, left


def compare(options: Options, request: Request, folder: Path, console: Console) -> int:
    """Train every method with every seed; learning rates are chosen by validation loss with the first seed."""
    with quiet():
        return _compare(options, request, folder, console)


def _compare(options: Options, request: Request, folder: Path, console: Console) -> int:
    say = lambda text: console.print(text, highlight=False, soft_wrap=True)  # noqa: E731
    work = prepare(options)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from error
    names, left = candidates(work, options, request.methods)
    jobs = [(name, replace(options, method=name, hyper={})) for name in names]
    if request.reference:
        jobs.insert(0, (FULL, replace(options, method="full", hyper={"in_place": True, "tie": "share"})))
    base = before(work, say)
    report = {
        "peftlab": peftlab.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **work.facts(),
        "sizes": {"train": len(work.train), "val": len(work.val), "test": len(work.test)},
        "seeds": request.seeds,
        "before": base,
        "left_out": dict(left),
        "methods": [],
        "runs": [],
    }
    lines = [("linear probe", base["accuracy"])] if "accuracy" in base else [("without adapting", base["loss"])]
    if isinstance(work.task, Classify):
        accuracy, size = bow(work)
        report["bag_of_words"] = {"accuracy": accuracy, "weights": size}
        lines.append(("bag of words", accuracy))
        say(f"bag of words: test accuracy {100 * accuracy:.1f} %")
    for name, why in left:
        say(f"left out {name}: {escape(why)}")

    around = {name: [rate(job.method) * f for f in AROUND] for name, job in jobs}
    # Rates that suit adapters ruin a whole model: the reference keeps its own.
    rates = {name: [rate(job.method)] if request.rates and name == FULL else request.rates or around[name] for name, job in jobs}
    runs = sum(len(rates[name]) + len(request.seeds) - 1 for name, _ in jobs)
    finished, failed = True, []
    with tqdm(total=runs, unit="run", dynamic_ncols=True, file=console.file) as bar:
        for name, job in jobs:
            try:
                row = one_method(name, work, job, request, rates[name], report["runs"], bar)
            except (ValueError, RuntimeError, UserError) as error:
                failed.append(name)
                report["left_out"][name] = f"failed: {error}"
                left.append((name, f"failed: {error}"))
                bar.write(f"{name} failed: {error}", file=console.file)
                continue
            if row is None:
                finished = False
                break
            report["methods"].append(row)
            write(report, folder)
    if not report["methods"]:
        raise UserError("no method was trained to the end; nothing to draw")
    show(report, lines, left, folder, work, console)
    if failed:
        raise Broken(f"failed: {', '.join(failed)} (the reasons are in {folder / 'compare.json'})")
    return 0 if finished else 130


def bow(work: Work) -> tuple[float, int]:
    """Accuracy and size of the bag-of-words reference."""
    split = work.split
    pairs = [([row.text for row in getattr(split, part)], work.labels(part)) for part in ("train", "val", "test")]
    return bag_of_words(*pairs, len(split.classes))


def one_method(name: str, work: Work, options: Options, request: Request, rates: list[float], runs: list[dict], bar: tqdm) -> dict | None:
    """All runs of one method, summed up; None when Ctrl-C stopped them."""
    mine: list[dict] = []
    best = None
    for i, seed in enumerate(request.seeds):
        for lr in rates if i == 0 else [best]:
            bar.set_description_str(f"{name} seed {seed} lr {lr:.2g}")
            try:
                run = one_run(work, replace(options, seed=seed), Settings(**request.settings | {"lr": lr, "seed": seed}))
            except Diverged as error:
                bar.write(f"{name} seed {seed}: {error}", file=bar.fp)
                runs.append({"method": name, "seed": seed, "lr": lr, "diverged": True})
                bar.update()
                continue
            if run is None:
                return None
            mine.append({"method": name, **run})
            runs.append(mine[-1])
            bar.update()
        if not mine:
            raise Diverged(f"no learning rate of {rates} keeps the loss finite")
        if i == 0:
            best = min(mine, key=lambda r: r["val_loss"])["lr"]
    kept = [r for r in mine if r["lr"] == best]
    key = "test_accuracy" if isinstance(work.task, Classify) else "test_loss"
    values = [r[key] for r in kept]
    peaks = [r["peak_bytes"] for r in kept if r["peak_bytes"] is not None]
    return {
        "name": name,
        "reference": name == FULL,
        "trainable": kept[0]["trainable"],
        "mean": statistics.fmean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "lr": best,
        "step_ms": 1000 * statistics.median(r["step_seconds"] for r in kept),
        "peak_bytes": statistics.median(peaks) if peaks else None,
        "file_bytes": kept[0]["file_bytes"],
        "train_seconds": statistics.fmean(r["seconds"] for r in kept),
    }


def one_run(work: Work, options: Options, settings: Settings) -> dict | None:
    """Train once, take the best checkpoint, test it; None when Ctrl-C stopped it."""
    task = work.task
    model = attach(task.load(), work, options)
    with tempfile.TemporaryDirectory() as name:
        loop = Loop(model, task, work.train, work.val, settings, Path(name))
        with PeakMemory(task.device) as memory:
            if not loop.run(states=False):
                return None
        peftlab.load(model, loop.folder / BEST)
        size = (loop.folder / BEST).stat().st_size
    scores = task.evaluate(model, work.test)
    history = loop.history
    return {
        "settings": asdict(settings),
        "seed": settings.seed,
        "lr": settings.lr,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "file_bytes": size,
        "best_step": history.best_step,
        "val_loss": history.best_loss,
        "test_loss": scores.loss,
        "test_accuracy": scores.accuracy,
        "seconds": history.seconds,
        "step_seconds": history.step_seconds,
        "peak_bytes": memory.bytes,
        "train": history.train,
        "val": history.val,
    }


def write(report: dict, folder: Path) -> None:
    """The raw numbers, so far."""
    part = folder / ".compare.json.part"
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf8")
    os.replace(part, folder / "compare.json")


def show(report: dict, lines: list[tuple[str, float]], left: list[tuple[str, str]], folder: Path, work: Work, console: Console) -> None:
    """Table on the screen, and PNG, HTML and JSON in the folder."""
    accuracy = isinstance(work.task, Classify)
    rows = sorted(report["methods"], key=lambda r: -r["mean"] if accuracy else r["mean"])
    metric = "test accuracy" if accuracy else "test NLL per token"
    head = ["method", "trainable", metric, "learning rate", "step", "peak memory", "file", "training"]
    body = [
        [
            row["name"],
            f"{row['trainable']:,}",
            _mean(row, accuracy),
            f"{row['lr']:.2g}",
            f"{row['step_ms']:.0f} ms",
            "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB",
            f"{row['file_bytes'] / 2**10:,.0f} KiB",
            f"{row['train_seconds']:.0f} s",
        ]
        for row in rows
    ]
    body += [[label, "", f"{100 * value:.1f} %" if accuracy else f"{value:.4f}", "", "", "", "", ""] for label, value in lines]
    table = Table(*head)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in body:
        table.add_row(*map(escape, row))
    console.print(table)
    title = f"{work.model_name} on {work.split.name}"
    draw.comparison(folder / "compare.png", rows, lines, title, metric)
    sizes, seeds = report["sizes"], report["seeds"]
    facts = [
        f"{sizes['train']:,} training, {sizes['val']:,} validation and {sizes['test']:,} test examples; "
        f"{len(seeds)} seeds ({', '.join(map(str, seeds))}); "
        "the same data for all.",
        "Mean and standard deviation over seeds. The learning rate of each method is the one of those tried with the lowest "
        "validation loss (first seed); "
        "the checkpoint is that with the lowest validation loss.",
        f"Step: median time of a training step ({report['threads']} threads, {report['device']}). "
        "Peak memory: above what was in use before training, "
        "the model itself not counted.",
        f"{FULL}: all parameters, trained in place. torch {report['torch']}, peftlab {report['peftlab']}.",
    ]
    draw.page(folder / "compare.html", folder / "compare.png", title, facts, head, body, left)
    write(report, folder)
    console.print(f"figure {folder / 'compare.png'}, page {folder / 'compare.html'}, raw numbers {folder / 'compare.json'}", soft_wrap=True)


def _mean(row: dict, accuracy: bool) -> str:
    factor, unit, digits = (100, " %", 1) if accuracy else (1, "", 4)
    spread = "" if row["spread"] is None else f" ± {factor * row['spread']:.{digits}f}"
    return f"{factor * row['mean']:.{digits}f}{spread}{unit}"
