"""Reference points: logistic regression on frozen embeddings (the linear probe) and on tf-idf counts (the bag of words)."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Logistic(NamedTuple):
    """Logits are X @ weight.T + bias; weight (classes, n), bias (classes,)."""

    weight: Tensor
    bias: Tensor

    def accuracy(self, X: Tensor, y: Tensor) -> float:
        """Share of rows of X (examples, n) whose largest logit is y."""
        return ((X @ self.weight.T + self.bias).argmax(1) == y).float().mean().item()


def logistic(X: Tensor, y: Tensor, classes: int, l2: float) -> Logistic:
    """Multinomial logistic regression, mean loss + l2 |weight|^2 / 2, by L-BFGS in float64; X (examples, n) may be sparse."""
    X = X.double()
    W = torch.zeros(X.shape[1], classes, dtype=X.dtype, requires_grad=True)
    b = torch.zeros(classes, dtype=X.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([W, b], max_iter=300, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(X @ W + b, y) + l2 / 2 * W.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return Logistic(W.detach().T.float(), b.detach().float())


def fit(X: Tensor, y: Tensor, X_val: Tensor, y_val: Tensor, classes: int, l2s: tuple[float, ...]) -> tuple[Logistic, float]:
    """The regression whose strength of regularisation does best on validation data, and that strength."""
    best, best_l2, best_loss = None, 0.0, math.inf
    for l2 in l2s:
        model = logistic(X, y, classes, l2)
        loss = F.cross_entropy(X_val @ model.weight.T + model.bias, y_val).item()
        if loss < best_loss:
            best, best_l2, best_loss = model, l2, loss
    if best is None:
        raise ValueError("the validation loss is not a number")
    return best, best_l2


def probe(X: Tensor, y: Tensor, X_val: Tensor, y_val: Tensor, classes: int) -> tuple[Logistic, float]:
    """Linear probe on features (examples, n): standardised inside, returned for the features as they are."""
    mean, scale = X.mean(0), X.std(0).clamp_min(1e-6)
    model, l2 = fit((X - mean) / scale, y, (X_val - mean) / scale, y_val, classes, (1e-3, 1e-2, 1e-1, 3e-1, 1, 3))
    weight = model.weight / scale
    return Logistic(weight, model.bias - weight @ mean), l2


class BagOfWords:
    """tf-idf of lower-case words and word pairs seen in at least two training texts, rows of length one."""

    def __init__(self, texts: list[str]):
        documents = Counter(term for text in texts for term in set(_terms(text)))
        kept = sorted(term for term, n in documents.items() if n >= 2)
        self.index = {term: i for i, term in enumerate(kept)}
        self.idf = {term: math.log((1 + len(texts)) / (1 + documents[term])) + 1 for term in kept}

    def __call__(self, texts: list[str]) -> Tensor:
        """(texts, terms), sparse."""
        rows, columns, values = [], [], []
        for row, text in enumerate(texts):
            counts = {term: n * self.idf[term] for term, n in Counter(_terms(text)).items() if term in self.index}
            norm = math.sqrt(sum(v * v for v in counts.values())) or 1.0
            for term, value in counts.items():
                rows.append(row)
                columns.append(self.index[term])
                values.append(value / norm)
        size = (len(texts), len(self.index))
        return torch.sparse_coo_tensor(torch.tensor([rows, columns]), torch.tensor(values), size, check_invariants=True).coalesce()


def _terms(text: str) -> list[str]:
    words = re.findall(r"[\w']+", text.lower())
    return words + [f"{a} {b}" for a, b in itertools.pairwise(words)]


Texts = tuple[list[str], Tensor]  # texts and their classes


def bag_of_words(train: Texts, val: Texts, test: Texts, classes: int) -> tuple[float, int]:
    """Test accuracy and number of weights of a tf-idf + logistic regression."""
    bag = BagOfWords(train[0])
    if not bag.index:
        return (test[1] == train[1].mode().values).float().mean().item(), 0
    model, _ = fit(bag(train[0]), train[1], bag(val[0]), val[1], classes, (1e-5, 1e-4, 3e-4, 1e-3, 3e-3))
    return model.accuracy(bag(test[0]), test[1]), (len(bag.index) + 1) * classes
