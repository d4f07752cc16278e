"""Intervals, pairing, and plain words where pretraining did not help."""

from __future__ import annotations

import math

import pytest

from mpp.verdict import NO_HELP, Verdict, estimate, table


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
    assert verdict.helped() is True
    assert verdict.metrics["scratch"]["ece"].mean == pytest.approx(0.05)
    assert Verdict.of(None, cells(scratch=[0.4])).helped() is None


@pytest.mark.parametrize(
    ("gains", "helped"),
    [
        ([0.02, -0.01, 0.01], False),
        ([-0.2, -0.21, -0.22], False),
        ([0.2, 0.21, 0.22], True),
        ([-0.1], False),
        ([0.1], None),
    ],
)
def test_it_says_when_pretraining_did_not_help(gains: list[float], helped: bool | None) -> None:
    verdict = Verdict.of(100, cells(pretrained=[0.5 + g for g in gains], scratch=[0.5] * len(gains)))
    assert verdict.helped() is helped
    assert (NO_HELP in table([verdict])) == (helped is False)
    if gains[0] == -0.2:
        assert "it hurt, by more than the interval" in table([verdict])
    elif helped is False:
        assert ("one seed, and no gain" if len(gains) == 1 else "the gain is within its interval") in table([verdict])
    both = table([Verdict.of(10, cells(pretrained=[0.9] * 3, scratch=[0.5, 0.51, 0.5])), verdict])
    assert (f"100 labels a class: {NO_HELP}" in both) == (helped is False)
    assert f"10 labels a class: {NO_HELP}" not in both
    if len(gains) == 1:
        assert "one seed: no interval" in table([verdict])
