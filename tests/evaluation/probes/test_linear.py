"""The linear probe finds scikit-learn's optimum on the same features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mpp.evaluation.probes import linear
from tests.evaluation.probes.test_knn import CPU, clusters


def uneven(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features of very different scales, one that never changes and one with a large mean."""
    x, y = clusters(n, seed)
    x = x * np.logspace(-3, 3, x.shape[1], dtype=np.float32)
    x[:, 3] = 7
    x[:, 5] += 1000
    return x, y


@pytest.mark.parametrize("decay", [1e-3, 1e-1, 1.0])
@pytest.mark.parametrize("chunk", [33, 10_000])
def test_as_scikit_learn(decay: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "CHUNK", chunk)
    (x, y), (queries, labels) = uneven(300, 1), uneven(200, 2)
    ours = linear.fit(x, y, 4, decay, device=CPU, max_iterations=300)
    scaler = StandardScaler().fit(x.astype(np.float64))
    theirs = LogisticRegression(C=1 / (len(x) * decay), tol=1e-8, max_iter=2000).fit(scaler.transform(x), y)
    logits = ours.logits(torch.from_numpy(queries)).softmax(-1).numpy()
    np.testing.assert_allclose(logits, theirs.predict_proba(scaler.transform(queries)), atol=2e-3)
    assert (ours.predict(queries) == theirs.predict(scaler.transform(queries))).mean() >= 0.995
    assert 0.4 < (ours.predict(queries) == labels).mean() < 1


def test_a_warm_start_ends_where_a_cold_one_does() -> None:
    x, y = uneven(300, 1)
    strong = linear.fit(x, y, 4, 1.0, device=CPU, max_iterations=300)
    warm = linear.fit(x, y, 4, 1e-2, device=CPU, max_iterations=300, start=strong)
    cold = linear.fit(x, y, 4, 1e-2, device=CPU, max_iterations=300)
    torch.testing.assert_close(warm.weight, cold.weight, atol=5e-3, rtol=0)
    assert not torch.equal(strong.weight, cold.weight), "the start must not be changed"


def test_files_do_as_memory_does(tmp_path: Path) -> None:
    x, y = uneven(100, 1)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    a, b = (linear.fit(f, y, 4, 0.1, device=CPU, max_iterations=50) for f in (x, mapped))
    assert torch.equal(a.weight, b.weight)


def test_a_feature_that_never_changes_says_nothing() -> None:
    x, y = uneven(100, 1)
    fitted = linear.fit(x, y, 4, 0.1, device=CPU, max_iterations=50)
    assert fitted.scale[3] == 0
    assert np.isfinite(fitted.predict(np.full_like(x, 1e6))).all()
