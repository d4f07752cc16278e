"""kNN gives scikit-learn's answers on the same features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from mpp.evaluation.probes import knn

CPU = torch.device("cpu")


def clusters(n: int, seed: int, classes: int = 4, dim: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Return overlapping clouds far from zero, like features after a ReLU."""
    centres = np.random.default_rng(0).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return (centres[labels] + 1.2 * rng.normal(size=(n, dim)) + 2).astype(np.float32), labels


@pytest.mark.parametrize("chunk", [7, 64, 10_000])
def test_as_scikit_learn(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "CHUNK", chunk)
    (x, y), (queries, labels) = clusters(200, 1), clusters(90, 2)
    found = knn.accuracies(x, y, queries, labels, (1, 5, 20, 100), 4, CPU)
    assert list(found) == [1, 5, 20, 100]
    for k, accuracy in found.items():
        theirs = KNeighborsClassifier(k, metric="cosine").fit(x, y)
        ours = knn.vote(y[knn.nearest(x, queries, k, CPU)], k, 4)
        assert np.array_equal(ours, theirs.predict(queries))
        assert accuracy == pytest.approx(theirs.score(queries, labels))
    assert 0.4 < found[20] < 1, "the accuracy must be neither trivial nor perfect"


def test_files_do_as_memory_does(tmp_path: Path) -> None:
    (x, _), (queries, _) = clusters(50, 1), clusters(20, 2)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert np.array_equal(knn.nearest(mapped, queries, 5, CPU), knn.nearest(x, queries, 5, CPU))


def test_more_neighbours_than_images() -> None:
    (x, y), (queries, labels) = clusters(6, 1), clusters(5, 2)
    assert list(knn.accuracies(x, y, queries, labels, (1, 5, 20), 4, CPU)) == [1, 5]
    assert list(knn.accuracies(x, y, queries, labels, (20,), 4, CPU)) == [6], "k is limited to the number of images"


def test_ties_go_to_the_smallest_class() -> None:
    assert knn.vote(np.array([[3, 1, 1, 3], [2, 0, 1, 3]]), 4, 4).tolist() == [1, 0]
    assert knn.vote(np.array([[3, 1, 1, 3]]), 1, 4).tolist() == [3]
