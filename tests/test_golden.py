"""Files that earlier versions saved load to the same bits, and give the same outputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import peftlab

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))

import make  # noqa: E402 - beside the files

EXPECTED = json.loads(make.OUTPUTS.read_text())


def test_every_file_has_its_outputs():
    assert {p.stem for p in GOLDEN.glob("*.safetensors")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_file(name):
    case = name.partition("--")[2]
    model = make.base(case)
    path = GOLDEN / f"{name}.safetensors"
    peftlab.load(model, path)
    there = model.state_dict(keep_vars=True)
    with safe_open(path, "pt") as f:
        saved = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - not a dict
    assert saved, "a golden file without tensors says nothing"
    for key, value in saved.items():
        assert there[key].dtype == value.dtype, key
        assert torch.equal(there[key].detach(), value), key
    torch.testing.assert_close(torch.tensor(make.output(model, case)), torch.tensor(EXPECTED[name]), rtol=1e-9, atol=1e-9)
