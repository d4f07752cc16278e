"""The target `clusters`: balanced probabilities, and directions that follow the features of a step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from mpp.encoders.adapter import adapt
from mpp.objective.targets import clusters as module
from mpp.objective.targets.clusters import ClustersTarget, balance
from tests.contracts.test_components import images_of, raw_of, target_of


def clusters(**changes: Any) -> ClustersTarget:
    target: ClustersTarget = target_of("clusters", **{"clusters": 6, "decay": 0.5, "decay_end": 0.5} | changes)
    return target


def after_step(target: ClustersTarget, made: bool = True) -> None:
    student = adapt(copy.deepcopy(target.teacher.model), (12, 20))
    target.after_step(student, 1, 2, torch.tensor(made))


@given(st.integers(0, 99), st.integers(2, 60), st.integers(2, 9), st.floats(0.01, 10))
def test_balance_divides_by_the_sums_of_columns_and_rows_in_turn(seed: int, n: int, k: int, spread: float) -> None:
    scores = spread * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    expected = scores.double().exp()
    for _ in range(module.SINKHORN_STEPS):
        expected = expected / expected.sum(0)
        expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(balance(scores), expected.float(), rtol=1e-3, atol=1e-5)


def test_no_cluster_takes_all_tokens() -> None:
    scores = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    scores[:, 0] += 20
    assert scores.softmax(1).mean(0).max() > 0.99
    torch.testing.assert_close(balance(scores).mean(0), torch.full((8,), 1 / 8), rtol=0.1, atol=0)


def test_targets_are_neither_uniform_nor_certain_at_the_start() -> None:
    target = clusters(clusters=64).eval()
    values = target(images_of(raw_of(3)))
    entropy = -(values * values.clamp_min(1e-30).log()).sum(-1).mean() / torch.tensor(64.0).log()
    assert 0.05 < entropy < 0.8


def test_directions_follow_the_features_that_belong_to_them() -> None:
    target = clusters(cluster_decay=0.25).train()
    images = images_of(raw_of(3))
    features = torch.nn.functional.normalize(target.teacher(images, target.grid), dim=-1).flatten(0, 1)
    belongs = target(images).flatten(0, 1).argmax(-1)
    before = target.directions.clone()
    after_step(target)
    for k in range(6):
        if not (belongs == k).any():
            assert torch.equal(target.directions[k], before[k])
            continue
        moved = 0.25 * before[k] + 0.75 * features[belongs == k].mean(0)
        torch.testing.assert_close(target.directions[k], moved / moved.norm())
    assert len(belongs.unique()) > 3
    assert target.counts.sum() == 0


def test_a_step_that_is_not_made_and_evaluation_leave_the_clusters_alone() -> None:
    target, images = clusters().train(), images_of(raw_of(3))
    before = target.directions.clone()
    target(images)
    after_step(target, made=False)
    assert torch.equal(target.directions, before)
    target.eval()
    target(images)
    target.train()
    after_step(target)
    assert torch.equal(target.directions, before)


def test_only_the_directions_are_kept_in_a_checkpoint() -> None:
    kept = set(clusters().state_dict())
    assert "directions" in kept
    assert not {"sums", "counts"} & kept
