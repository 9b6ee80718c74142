"""peftlab with transformers.Trainer: LoRA on a real sentence encoder, real movie-review sentences.

The Trainer sees an ordinary Hugging Face model and needs no setting. Needs the extra `demo`; a minute or two on two cores:

    python examples/hf_trainer.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import peftlab
from peftlab.cli.data import Row, default_rows, split
from peftlab.cli.tasks import default_folder


def fresh_model() -> torch.nn.Module:
    """The encoder with a new classification head, always the same one."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(default_folder(), num_labels=2, dtype=torch.float32)


def encoded(rows: list[Row], classes: list[str]) -> list[dict]:
    """What the Trainer's collator pads."""
    tokenizer = AutoTokenizer.from_pretrained(default_folder())
    ids = tokenizer([row.text for row in rows], truncation=True, max_length=40)["input_ids"]
    return [{"input_ids": i, "labels": classes.index(row.label)} for i, row in zip(ids, rows, strict=True)]


def main() -> None:
    """Train, test, save one file, reload it into a fresh model, test again."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--train", type=int, default=2000)
    options.add_argument("--test", type=int, default=1000)
    options.add_argument("--epochs", type=float, default=2)
    options = options.parse_args()

    data = split(default_rows(), "Rotten Tomatoes", "classify", (options.train, 100, options.test), seed=0)
    train, test = encoded(data.train, data.classes), encoded(data.test, data.classes)

    model = fresh_model()
    peftlab.wrap(model, "lora", r=8, targets="bert.encoder.*")
    peftlab.wrap(model, "full", targets=["pooler", "classifier"], name="head")  # trained copies, saved in the same file
    print(peftlab.report(model))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=options.epochs, per_device_train_batch_size=16, per_device_eval_batch_size=64, learning_rate=1e-3,
            warmup_steps=20, logging_steps=50, save_strategy="no", report_to="none", seed=0, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        accuracy = lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())}  # noqa: E731
        tools = {"processing_class": AutoTokenizer.from_pretrained(default_folder()), "compute_metrics": accuracy}
        trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=test, **tools)
        trainer.train()
        after = trainer.evaluate()

        file = Path(folder) / "adapter.safetensors"
        print(peftlab.save(model, file))
        again = fresh_model()
        peftlab.load(again, file, trainable=False)
        reloaded = Trainer(again, arguments, eval_dataset=test, **tools).evaluate()
    print(f"test accuracy {after['eval_accuracy']:.3f}, after reloading {reloaded['eval_accuracy']:.3f}")


if __name__ == "__main__":
    main()
