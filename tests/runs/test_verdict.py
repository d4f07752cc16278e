"""Intervals, pairing, and the one conclusion that they allow."""

from __future__ import annotations

import json
import math

import pytest

from mpp.runs.verdict import Verdict, conclude, estimate, stored_estimate, table


def cells(**accuracies: list[float]) -> dict[str, list[dict[str, float]]]:
    return {arm: [{"accuracy": a, "ece": a / 10} for a in values] for arm, values in accuracies.items()}


def test_the_interval_is_students() -> None:
    # by hand: mean 2, sd 1, t(2) = 4.303 -> 4.303 / sqrt(3)
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.half_width) == (2.0, pytest.approx(2.4843, abs=1e-3))
    assert math.isnan(estimate([1.0]).half_width)


def test_the_gain_is_paired_by_seed() -> None:
    verdict = Verdict.of(None, cells(pretrained=[0.5, 0.7, 0.6], scratch=[0.4, 0.6, 0.5]))
    assert verdict.gain is not None
    assert verdict.gain.values == pytest.approx([0.1, 0.1, 0.1])
    assert verdict.gain.half_width < 1e-9, "the seeds differ by a lot, the pairs not at all"
    assert conclude(verdict.gain).kind == "helped"
    assert verdict.metrics["scratch"]["ece"].mean == pytest.approx(0.05)
    assert Verdict.of(None, cells(scratch=[0.4])).gain is None


@pytest.mark.parametrize(
    ("gains", "kind", "words"),
    [
        ([0.02, -0.01, 0.01], "not_shown", "a gain is not shown with 3 seeds: its 95 % interval holds zero"),
        ([0.02, 0.038], "not_shown", "a gain is not shown with 2 seeds"),
        ([-0.2, -0.21, -0.22], "hurt", "pretraining hurt: the 95 % interval of the gain is below zero"),
        ([0.2, 0.21, 0.22], "helped", "pretraining helped: the 95 % interval of the gain is above zero"),
        ([-0.1], "one_seed", "one seed, so no interval and no conclusion"),
        ([0.005], "one_seed", "one seed, so no interval and no conclusion"),
    ],
)
def test_what_a_gain_allows_to_say(gains: list[float], kind: str, words: str) -> None:
    """On the terminal; the report has the same function, see test_symptoms.py and test_reporting.py."""
    verdict = Verdict.of(100, cells(pretrained=[0.5 + g for g in gains], scratch=[0.5] * len(gains)))
    assert verdict.gain is not None
    found = conclude(verdict.gain)
    assert found.kind == kind
    assert found.text.startswith(words)
    assert found.text in table([verdict])
    assert "did not help" not in table([verdict])
    both = table([Verdict.of(10, cells(pretrained=[0.9] * 3, scratch=[0.5, 0.51, 0.5])), verdict])
    assert (f"100 labels a class: {words}" in both) == (kind != "helped")
    assert "10 labels a class: pretraining" not in both
    written = json.loads(
        json.dumps({"mean": verdict.gain.mean, "half_width": verdict.gain.half_width, "values": gains})
    )
    assert conclude(stored_estimate(written)) == found
    if kind == "one_seed":
        assert conclude(stored_estimate(written | {"half_width": None})) == found
