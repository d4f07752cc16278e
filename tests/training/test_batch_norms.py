"""Statistics of batch norms, measured after training."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpp.training.batch_norms import (
    AT_ONCE,
    LEAST_IMAGES,
    MEASURED_ON,
    batch_norms_of,
    choose_batches,
    measure_batch_norms,
    restore_statistics,
    use_batch_statistics,
)


def trained() -> nn.Sequential:
    """Return a network whose statistics come from other images than the tests use."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5))
    model(torch.randn(8, 3, 4, 4) + 3)
    return model


def test_statistics_are_the_mean_over_the_batches() -> None:
    model = trained()
    first, second = batch_norms_of(model)
    first.momentum = 0.3
    batches = [torch.randn(size, 3, 4, 4) for size in (8, 6, 7)]
    measure_batch_norms(model, [first, second], iter(batches))
    embedded = [model[0](batch) for batch in batches]
    torch.testing.assert_close(first.running_mean, torch.stack([x.mean((0, 2, 3)) for x in embedded]).mean(0))
    torch.testing.assert_close(first.running_var, torch.stack([x.var((0, 2, 3)) for x in embedded]).mean(0))
    assert (first.momentum, second.momentum) == (0.3, 0.1)
    assert not any(m.training for m in model.modules())
    hidden = [model[3](nn.functional.batch_norm(x, None, None, first.weight, first.bias, True)) for x in embedded]
    torch.testing.assert_close(second.running_mean, torch.stack([x.mean((0, 2, 3)) for x in hidden]).mean(0))


def test_norms_that_are_not_named_stay() -> None:
    model = trained()
    first, second = batch_norms_of(model)
    before = {name: value.clone() for name, value in first.named_buffers()}
    measure_batch_norms(model, [second], [torch.randn(8, 3, 4, 4)])
    assert all(torch.equal(value, before[name]) for name, value in first.named_buffers())


def test_without_images_the_statistics_stay() -> None:
    model = trained()
    before = {name: value.clone() for name, value in model.named_buffers()}
    measure_batch_norms(model, batch_norms_of(model), [])
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_statistics_of_a_batch_leave_those_of_the_model_alone() -> None:
    model, images = trained(), torch.randn(8, 3, 4, 4)
    model[2] = nn.Identity()
    expected = model.train()(images)
    model = trained().eval()
    model[2] = nn.Identity()
    before = {name: value.clone() for name, value in model.named_buffers()}
    own = model(images)
    with use_batch_statistics(batch_norms_of(model)):
        torch.testing.assert_close(model(images), expected)
    assert torch.equal(model(images), own)
    assert not torch.allclose(own, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_a_model_without_batch_norms_is_not_run() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_forward_hook(lambda *_: pytest.fail("run for nothing"))
    measure_batch_norms(model, batch_norms_of(model), [torch.zeros(2, 2)])
    assert not model.training


def test_what_no_image_reaches_stays() -> None:
    model = trained()
    unused = nn.BatchNorm2d(4)
    nn.init.constant_(unused.running_mean, 3.0)  # type: ignore[arg-type]
    measure_batch_norms(model, [*batch_norms_of(model), unused], [torch.randn(8, 3, 4, 4)])
    assert unused.running_mean.tolist() == [3.0] * 4  # type: ignore[union-attr]
    assert not unused.training


def test_statistics_come_back() -> None:
    model, images = trained(), torch.randn(8, 3, 4, 4)
    norms = batch_norms_of(model)
    before = model.eval()(images)
    with restore_statistics(norms):
        measure_batch_norms(model, norms, [images])
        assert not torch.allclose(model(images), before)
    assert torch.equal(model(images), before)


@given(st.integers(0, 3 * MEASURED_ON), st.integers(3, AT_ONCE))
def test_batches_are_of_nearly_the_same_size(count: int, most: int) -> None:
    batches = choose_batches(range(100, 100 + count), most)
    chosen = [number for batch in batches for number in batch]
    assert len(set(chosen)) == len(chosen) == (min(count, MEASURED_ON) if count >= LEAST_IMAGES else 0)
    assert set(chosen) <= set(range(100, 100 + count))
    sizes = {len(batch) for batch in batches}
    assert not sizes or (min(sizes) > 1 and max(sizes) <= most and max(sizes) - min(sizes) <= 1)


def test_batches_mix_images_whatever_their_order() -> None:
    """The images are sorted by class, or the classes alternate."""
    for classes in (torch.arange(640) // 64, torch.arange(640) % 10):
        shares = [len(set(classes[batch].tolist())) for batch in choose_batches(range(640))]
        assert min(shares) >= 9
