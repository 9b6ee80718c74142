"""`peftlab finetune`: one run from a pretrained model to a checked adapter file."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from torch import nn
from tqdm import tqdm

import peftlab
from peftlab.cli import draw
from peftlab.cli.baselines import probe
from peftlab.cli.errors import Broken, UserError, blamed
from peftlab.cli.loop import BEST, STATE, Loop, Settings, read_state
from peftlab.cli.tasks import Classify, Scores, quiet
from peftlab.cli.work import Options, PeakMemory, Work, attach, mergeable, prepare, rate, wrap_options

FILE = "adapter.safetensors"
TOLERANCE = 1e-4  # largest difference between merged and adapted outputs, relative to the largest output (float32, all layers)


@dataclass
class Output:
    """Where to write, and whether to go on with an earlier run there."""

    folder: Path
    resume: bool = False
    restart: bool = False

    def check(self) -> None:
        """UserError where the folder cannot be used or holds an unfinished run that nothing was said about."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out {self.folder}: not a folder")
        if self.resume:
            read_state(self.folder)
        elif (self.folder / STATE).exists() and not self.restart:
            raise UserError(f"--out {self.folder} holds an unfinished run: --resume continues it, --restart throws it away")

    def clear(self) -> None:
        """Make the folder and take an earlier run's results away, so that an interrupted run does not stand beside them."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (FILE, "loss.png", "report.json"):
                (self.folder / name).unlink(missing_ok=True)
            self.tidy()
        except OSError as error:
            raise UserError(f"--out {self.folder}: {error.strerror}") from error

    def tidy(self) -> None:
        """Remove what only a resumed run needs; the state first, since it names the others."""
        for old in (self.folder / STATE, self.folder / BEST, *self.folder.glob("step-*.safetensors")):
            old.unlink(missing_ok=True)


class Diary:
    """Collects the report and prints it as it grows."""

    def __init__(self, console: Console):
        self.console, self.start = console, time.perf_counter()
        self.report: dict = {"peftlab": peftlab.__version__, "torch": torch.__version__, "seconds": {}}

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.report["seconds"][name] = round(time.perf_counter() - start, 2)

    def write(self, folder: Path) -> None:
        self.report["seconds"]["total"] = round(time.perf_counter() - self.start, 2)
        part = folder / ".report.json.part"
        part.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf8")
        os.replace(part, folder / "report.json")


def result(scores: Scores) -> dict:
    """Scores as they are written into the report."""
    out = {"loss": scores.loss}
    return out if scores.accuracy is None else out | {"accuracy": scores.accuracy}


def show(scores: Scores) -> str:
    """Scores as they are printed."""
    if scores.accuracy is None:
        return f"NLL per token {scores.loss:.4f}"
    return f"accuracy {100 * scores.accuracy:.1f} % (loss {scores.loss:.4f})"


def finetune(options: Options, settings: dict, output: Output, console: Console) -> int:
    """Run the whole job; 0 where every promised equality held, 130 after Ctrl-C. Raises UserError and Broken."""
    with quiet():
        return _finetune(options, settings, output, Diary(console))


def _finetune(options: Options, settings: dict, output: Output, diary: Diary) -> int:
    say, report = diary.say, diary.report
    settings = Settings(**{"lr": rate(options.method), "seed": options.seed} | settings)
    output.check()
    with diary.timed("prepare"):
        work = prepare(options)
    task = work.task
    sizes = {"train": len(work.train), "val": len(work.val), "test": len(work.test)}
    report |= {"method": options.method, "options": options.hyper, "sizes": sizes, **work.facts(), "settings": asdict(settings)}
    say(
        f"[bold]{escape(work.model_name)}[/], {task.name} on {escape(work.split.name)}: "
        f"{sizes['train']:,} train, {sizes['val']:,} validation, {sizes['test']:,} test examples, at most {task.max_length} tokens"
    )

    model = task.load()
    report["parameters"] = sum(p.numel() for p in model.parameters())
    facts = work.facts() | {"method": options.method, "options": options.hyper, "targets": options.targets}
    state = None
    if output.resume:
        state = same_run(read_state(output.folder)[0], facts | asdict(settings))
        with blamed("--resume"):
            peftlab.load(model, output.folder / state["adapter"], trainable=True)
    else:
        with blamed(f"--method {options.method}"):
            say(escape(repr(peftlab.plan(model, options.method, seed=options.seed, **wrap_options(task, options)))))
        attach(model, work, options)
        output.clear()
    look(model, work, diary)
    loop = Loop(model, task, work.train, work.val, settings, output.folder, facts)
    if state is not None:
        loop.load_state()
        say(f"resumed at step {loop.history.step} of {loop.total}")
    with diary.timed("train"), PeakMemory(task.device) as memory:
        finished = train(loop, diary.console)
    history = loop.history
    report |= {"history": asdict(history), "peak_training_bytes": memory.bytes}
    if not finished:
        return interrupted(loop, output, diary)

    peftlab.load(model, output.folder / BEST)
    with diary.timed("after"):
        after = task.evaluate(model, work.test)
    report["after"] = result(after)
    saved = peftlab.save(model, output.folder / FILE)
    report["file_bytes"] = saved.bytes
    say(f"best validation loss {history.best_loss:.4f} at step {history.best_step} of {loop.total}")
    say(f"[bold]after:[/]  test {show(after)}")
    say(f"saved {output.folder / FILE}: {saved.bytes:,} bytes, {report['trainable']:,} trained parameters")

    with diary.timed("reload"):
        problems = verify(work, options, output.folder / FILE, after, diary)
    draw.loss_curve(output.folder / "loss.png", history.train, history.val, history.best_step, f"{options.method} on {work.split.name}")
    output.tidy()
    diary.write(output.folder)
    say(f"loss curve {output.folder / 'loss.png'}, report {output.folder / 'report.json'}, {report['seconds']['total']:.0f} s in all")
    if problems:
        raise Broken("; ".join(problems))
    return 0


def look(model: nn.Module, work: Work, diary: Diary) -> None:
    """Count, check and test the model before its training."""
    say, report = diary.say, diary.report
    report["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"trainable with the task's head: {report['trainable']:,}")
    with diary.timed("check"):
        report["check"] = checked(model, work)
    say(f"[green]check[/] {escape(report['check'].splitlines()[-1])}")
    with diary.timed("before"):
        report["before"] = before(work, say)


def same_run(state: dict, mine: dict) -> dict:
    """The state, if it is of the run that is asked for; UserError names what differs."""
    for key in sorted(mine.keys() | state["run"].keys()):
        if mine.get(key) != state["run"].get(key):
            raise UserError(f"--resume: the interrupted run had {key} = {state['run'].get(key)}, this one has {mine.get(key)}")
    return state


def checked(model: nn.Module, work: Work) -> str:
    """The table of `peftlab.check` on a few training examples; Broken names an adapter that does nothing."""
    try:
        return repr(peftlab.check(model, **work.task.batch(work.train[:8]).inputs))
    except peftlab.CheckError as error:
        raise Broken(" ".join(str(error).split())) from error


def before(work: Work, say) -> dict:
    """How far one comes without adapting: a linear probe on the frozen model, or the frozen language model itself."""
    task = work.task
    if not isinstance(task, Classify):
        scores = task.evaluate(task.load(), work.test)
        say(f"[bold]before:[/] test {show(scores)}")
        return result(scores)
    encoder = task.load_encoder()
    X = {part: task.features(encoder, getattr(work, part)) for part in ("train", "val", "test")}
    y = {part: work.labels(part) for part in X}
    regression, l2 = probe(X["train"], y["train"], X["val"], y["val"], len(task.classes))
    accuracy = regression.accuracy(X["test"], y["test"])
    majority = (y["test"] == y["train"].mode().values).float().mean().item()
    say(f"[bold]before:[/] test accuracy {100 * accuracy:.1f} % (linear probe on the frozen model; commonest class {100 * majority:.1f} %)")
    return {"accuracy": accuracy, "l2": l2, "majority": majority}


def train(loop: Loop, console: Console) -> bool:
    """Run the loop under a progress bar."""
    with tqdm(total=loop.total, initial=loop.history.step, unit="step", dynamic_ncols=True, file=console.file, mininterval=0.5) as bar:

        def on_step(step: int, loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()

        def on_eval(step: int, loss: float, accuracy: float | None) -> None:
            bar.write(
                f"step {step}: validation loss {loss:.4f}" + ("" if accuracy is None else f", accuracy {100 * accuracy:.1f} %"),
                file=console.file,
            )

        return loop.run(on_step, on_eval)


def interrupted(loop: Loop, output: Output, diary: Diary) -> int:
    """Keep the better of the best validated and the last adapter; everything for --resume is on disk already."""
    history = loop.history
    scores = loop.task.evaluate(loop.model, loop.val)
    path = output.folder / FILE
    if scores.loss < history.best_loss:
        peftlab.save(loop.model, path)
        kept, loss = history.step, scores.loss
    else:
        shutil.copyfile(output.folder / BEST, path)
        kept, loss = history.best_step, history.best_loss
    draw.loss_curve(output.folder / "loss.png", history.train, history.val, kept, f"interrupted at step {history.step}")
    diary.report |= {"interrupted": True, "kept_step": kept, "kept_loss": loss}
    diary.write(output.folder)
    diary.say(
        f"interrupted after step {history.step} of {loop.total}: the adapter of step {kept} (validation loss {loss:.4f}) is in {path}; "
        "the same command with --resume goes on"
    )
    return 130


def verify(work: Work, options: Options, path: Path, after: Scores, diary: Diary) -> list[str]:
    """Load the file into a fresh base and merge there; returns what does not hold."""
    task, say, problems = work.task, diary.say, []
    fresh = task.load()
    peftlab.load(fresh, path, trainable=False)
    again = task.evaluate(fresh, work.test)
    same = torch.equal(again.outputs, after.outputs)
    diary.report["reload"] = result(again) | {"outputs_equal": same}
    if same:
        say(f"[green]reload[/] into a fresh base: test {show(again)}, every output equal bit for bit")
    else:
        gap = (again.outputs - after.outputs).abs().max().item()
        problems.append(f"the reloaded model gives other outputs than the trained one (by {gap:.3g})")
    if not mergeable(options):
        diary.report["merge"] = None
        say(f"merge: {options.method} changes the call or trains in place; there is nothing to merge")
        return problems
    merged = peftlab.merge(fresh)
    scores = task.evaluate(fresh, work.test)
    gap = ((scores.outputs - again.outputs).abs().max() / again.outputs.abs().max()).item()
    moved = 0 if scores.accuracy is None else int((scores.outputs.argmax(1) != again.outputs.argmax(1)).sum())
    diary.report["merge"] = result(scores) | {"layers": merged.layers, "largest_relative_difference": gap, "predictions_changed": moved}
    if gap <= TOLERANCE:
        say(f"[green]merge[/] into {merged.layers} layers: test {show(scores)}, outputs differ by at most {gap:.1e} of the largest, {moved} predictions by rounding")
    else:
        problems.append(f"the merged model gives other outputs than the adapted one (by {gap:.3g} of the largest, {moved} predictions)")
    return problems
