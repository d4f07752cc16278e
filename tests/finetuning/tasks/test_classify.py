"""The metrics of classification are scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as theirs

from mpp.finetuning.tasks.classify import ClassifyTask


def guesses(n: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=rng) ** 2 % classes  # uneven
    logits = torch.randn(n, classes, generator=rng)
    logits[torch.arange(n), labels] += 1.0
    return logits, labels


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_as_scikit_learn() -> None:
    logits, labels = guesses(300, 4)
    found = ClassifyTask(8, 4).metrics([(logits, labels)])
    p, y = logits.softmax(-1).numpy(), labels.numpy()
    assert found["accuracy"] == pytest.approx(theirs.accuracy_score(y, p.argmax(1)))
    assert found["balanced_accuracy"] == pytest.approx(theirs.balanced_accuracy_score(y, p.argmax(1)))
    occurring = np.unique(y)
    assert len(occurring) < 4, "one class must never occur, and is left out"
    one = [theirs.roc_auc_score(y == c, p[:, c]) for c in occurring]
    assert found["auroc"] == pytest.approx(np.mean(one), abs=1e-5)
    one = [theirs.average_precision_score(y == c, p[:, c]) for c in occurring]
    assert found["map"] == pytest.approx(np.mean(one), abs=1e-5)


def test_calibration_by_hand() -> None:
    """The model is always 80 % sure and right half of the time."""
    logits = torch.tensor([[0.8, 0.2]]).log().repeat(10, 1)
    labels = torch.tensor([0, 1] * 5)
    assert ClassifyTask(8, 2).metrics([(logits, labels)])["ece"] == pytest.approx(0.3, abs=1e-5)


def test_one_class_alone_has_nothing_to_be_ranked_against() -> None:
    logits, _ = guesses(10, 3)
    found = ClassifyTask(8, 3).metrics([(logits, torch.zeros(10, dtype=torch.int64))])
    assert found.keys() == {"accuracy", "balanced_accuracy", "ece"}
    assert found["balanced_accuracy"] == found["accuracy"]
