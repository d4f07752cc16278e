"""Intervals, pairing, and the one conclusion that they allow."""

from __future__ import annotations

import json
import math

import pytest

from mpp.runs.verdict import Cost, Verdict, compare_approaches, conclude, estimate, stored_estimate, table


def trials(**accuracies: list[float]) -> dict[str, list[dict[str, float]]]:
    return {approach: [{"accuracy": a, "ece": a / 10} for a in values] for approach, values in accuracies.items()}


def test_the_interval_is_students() -> None:
    # by hand: mean 2, sd 1, t(2) = 4.303 -> 4.303 / sqrt(3)
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.half_width) == (2.0, pytest.approx(2.4843, abs=1e-3))
    assert math.isnan(estimate([1.0]).half_width)


def test_the_gain_is_paired_by_seed() -> None:
    verdict = Verdict.of(None, trials(pretrained=[0.5, 0.7, 0.6], scratch=[0.4, 0.6, 0.5]))
    assert verdict.gain is not None
    assert verdict.gain.values == pytest.approx([0.1, 0.1, 0.1])
    assert verdict.gain.half_width < 1e-9, "the seeds differ a lot, the pairs not at all"
    assert conclude(verdict.gain).kind == "helped"
    assert verdict.metrics["scratch"]["ece"].mean == pytest.approx(0.05)
    assert Verdict.of(None, trials(scratch=[0.4])).gain is None


@pytest.mark.parametrize(
    ("gains", "kind", "words"),
    [
        ([0.02, -0.01, 0.01], "not_shown", "a gain is not shown with 3 seeds: its 95 % interval holds zero"),
        ([0.02, 0.038], "not_shown", "a gain is not shown with 2 seeds"),
        (
            [-0.2, -0.21, -0.22],
            "hurt",
            "pretraining hurt, compared with the same fine-tuning from scratch: the 95 % interval of the gain is below zero",
        ),
        (
            [0.2, 0.21, 0.22],
            "helped",
            "pretraining helped, compared with the same fine-tuning from scratch: the 95 % interval of the gain is above zero",
        ),
        ([-0.1], "one_seed", "one seed, so no interval and no conclusion"),
        ([0.005], "one_seed", "one seed, so no interval and no conclusion"),
    ],
)
def test_what_a_gain_allows_to_say(gains: list[float], kind: str, words: str) -> None:
    """The terminal concludes as the report does, see tests/runs/test_symptoms.py and tests/reporting/test_report.py."""
    verdict = Verdict.of(100, trials(pretrained=[0.5 + g for g in gains], scratch=[0.5] * len(gains)))
    assert verdict.gain is not None
    found = conclude(verdict.gain)
    assert found.kind == kind
    assert found.text.startswith(words)
    assert found.text in table([verdict])
    assert "did not help" not in table([verdict])
    both = table([Verdict.of(10, trials(pretrained=[0.9] * 3, scratch=[0.5, 0.51, 0.5])), verdict])
    assert (f"100 labels a class: {words}" in both) == (kind != "helped")
    assert "10 labels a class: pretraining" not in both
    written = json.loads(
        json.dumps({"mean": verdict.gain.mean, "half_width": verdict.gain.half_width, "values": gains})
    )
    assert conclude(stored_estimate(written)) == found
    if kind == "one_seed":
        assert conclude(stored_estimate(written | {"half_width": None})) == found


@pytest.mark.parametrize(
    ("accuracies", "kind", "words"),
    [
        (
            {"pretrained": [0.480, 0.475, 0.485], "scratch": [0.32, 0.32, 0.33], "cnn": [0.610, 0.608, 0.616]},
            "best",
            "best here is the CNN from scratch, 13.1 points above the pretrained encoder: more than chance (95 % interval",
        ),
        (
            {"pretrained": [0.680, 0.675, 0.685], "scratch": [0.32, 0.32, 0.33], "cnn": [0.610, 0.608, 0.616]},
            "best",
            "best here is the pretrained encoder, 6.9 points above the CNN from scratch: more than chance (95 % interval",
        ),
        (
            {"pretrained": [0.68, 0.67, 0.69], "cnn": [0.61, 0.60, 0.62], "published": [0.90, 0.90, 0.91]},
            "best",
            "best here is the encoder with published weights, 22.3 points above the pretrained encoder: more than chance",
        ),
        (
            {"pretrained": [0.62, 0.60, 0.64], "scratch": [0.3, 0.3, 0.3], "cnn": [0.61, 0.62, 0.60]},
            "not_shown",
            "no approach is shown to be best with 3 seeds: the pretrained encoder is 1.0 points above the CNN from scratch, "
            "which may be chance (95 % interval -6.5 to +8.5)",
        ),
        (
            {"pretrained": [0.62], "cnn": [0.61]},
            "one_seed",
            "the pretrained encoder is 1.0 points above the CNN from scratch with one seed, which may be chance",
        ),
    ],
    ids=["cnn", "pretrained", "published", "no difference", "one seed"],
)
def test_the_sentence_about_approaches(accuracies: dict[str, list[float]], kind: str, words: str) -> None:
    verdict = Verdict.of(
        None,
        trials(**accuracies),
        "accuracy",
        Cost("CPU", {"pretrained": 13.6, "cnn": 0.0}, {"pretrained": 6.3, "cnn": 20.0}),
    )
    found = compare_approaches(verdict.score)
    assert found is not None
    assert found.kind == kind
    assert found.text.startswith(words)
    shown = table([verdict])
    assert shown.splitlines()[-1] == found.text
    assert "13.6 + 6.3 CPU-minutes" in shown
    assert "20.0 CPU-minutes" in shown
    assert f"all labels a class: {found.text}" not in shown
    assert f"10 labels a class: {found.text}" in table([Verdict.of(10, trials(**accuracies)), verdict])


def test_two_approaches_have_the_gain_and_no_second_sentence() -> None:
    shown = table([Verdict.of(None, trials(pretrained=[0.5, 0.7, 0.6], scratch=[0.4, 0.6, 0.5]))])
    assert "best here" not in shown
    assert compare_approaches({"pretrained": estimate([0.4])}) is None


def test_minutes_and_the_probe_stand_beside_each_number_of_labels() -> None:
    begun = {"pretrained": [{"accuracy": 0.5, "start_accuracy": 0.6}], "cnn": [{"accuracy": 0.4}]}
    verdicts = [
        Verdict.of(n, begun, "accuracy", Cost("CPU", {"pretrained": 13.6, "cnn": 0.0}, {"pretrained": n, "cnn": 20.0}))
        for n in (5, 25)
    ]
    shown = table(verdicts).splitlines()
    assert "5 labels a class: pretrained 13.6 + 5.0 CPU-minutes, cnn 20.0 CPU-minutes" in shown
    assert "25 labels a class: pretrained 13.6 + 25.0 CPU-minutes, cnn 20.0 CPU-minutes" in shown
    assert "25 labels a class: probe 60.0 % (its start; fine-tuning lost against it: lower optim.base_lr)" in shown
