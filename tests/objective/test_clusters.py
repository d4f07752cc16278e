"""The target `clusters`: balanced probabilities, and directions that follow the features of a step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpp.encoders.adapter import adapt
from mpp.objective.targets.clusters import ClustersTarget, balance
from tests.contracts.test_components import images_of, raw_of, target_of


def clusters(**changes: Any) -> ClustersTarget:
    target: ClustersTarget = target_of("clusters", **{"clusters": 6, "decay": 0.5, "decay_end": 0.5} | changes)
    return target


def after_step(target: ClustersTarget, made: bool = True) -> None:
    student = adapt(copy.deepcopy(target.teacher.model), (12, 20))
    target.after_step(student, 1, 2, torch.tensor(made))


@given(st.integers(0, 99), st.integers(1, 3), st.sampled_from([(40, 8), (40, 3), (5, 8)]), st.floats(0.01, 10))
def test_clusters_are_equally_frequent(seed: int, groups: int, shape: tuple[int, int], spread: float) -> None:
    scores = spread * torch.randn(groups, *shape, generator=torch.Generator().manual_seed(seed))
    scores[..., 0] += 5 * spread  # without a balance, nearly all tokens would go here
    probabilities = balance(scores)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(groups, shape[0]))
    frequency = probabilities.mean(1)
    assert frequency.sum(-1).allclose(torch.ones(groups))
    assert frequency.max() < 3 / shape[1]
    assert scores.softmax(-1).mean(1).max() >= frequency.max() - 1e-6


@pytest.mark.parametrize("positionwise", [False, True])
def test_each_place_or_all_places_are_balanced(positionwise: bool) -> None:
    target, raw = clusters(positionwise=positionwise).eval(), raw_of(3)
    values = target(images_of(raw))
    whole = target.teacher(images_of(raw), target.grid)
    scores = torch.nn.functional.normalize(whole, dim=-1) @ target.directions.T / target.temperature
    for place in range(2):
        alone = balance(scores[:, place].unsqueeze(0))[0]
        assert torch.allclose(values[:, place], alone, atol=1e-5) == positionwise


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
