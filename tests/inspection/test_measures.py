"""Every number of `mpp inspect` is compared with a case that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mpp.evaluation.rank import effective_rank, image_share
from mpp.inspection import measures
from mpp.inspection.measures import CkaTable, cka, gram
from mpp.objective.grid import sincos_positions


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(dim: int, seed: int = 1) -> torch.Tensor:
    return torch.linalg.qr(noise(dim, dim, seed=seed).double()).Q.float()


# ---- CKA


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 40), st.integers(1, 60), st.floats(0.01, 100), st.integers(0, 99))
def test_cka_of_features_with_a_rotation_of_them_is_1(n: int, dim: int, scale: float, seed: int) -> None:
    x = noise(n, dim, seed=seed)
    shifted = scale * x @ rotation(dim, seed + 1) + 3.0
    assert cka(x, shifted) == pytest.approx(1, abs=1e-4)


def test_hsic_is_the_unbiased_estimate_of_song_et_al() -> None:
    n = 12
    x, y = noise(n, 5), noise(n, 7, seed=2)
    k, m = ((v.double() @ v.double().T).fill_diagonal_(0) for v in (x, y))
    one = torch.ones(n, dtype=torch.float64)
    written_out = (
        (k @ m).trace() + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ m @ one
    ) / (n * (n - 3))
    assert float((gram(x) * gram(y)).sum() / (n * (n - 3))) == pytest.approx(float(written_out), rel=1e-5)


def test_cka_of_what_has_nothing_in_common_is_near_0_however_few_images() -> None:
    found = [cka(noise(16, 500, seed=2 * i), noise(16, 500, seed=2 * i + 1)) for i in range(200)]
    assert abs(sum(found) / len(found)) < 0.03, "the biased estimate gives about 0.97 here"


def test_minibatches_are_averaged_before_they_are_normalised() -> None:
    x, y = noise(64, 8), noise(64, 8, seed=1) + 0.5 * noise(64, 8)
    table = CkaTable()
    for part in range(0, 64, 16):
        a, b = gram(x[part : part + 16]), gram(y[part : part + 16])
        table.add(a[None], torch.stack([a, b]))
    values = table.values()[0]
    assert values[0] == pytest.approx(1)
    assert float(values[1]) == pytest.approx(cka(x, y), abs=0.15)
    assert math.isnan(cka(torch.ones(8, 3), noise(8, 3)))
    with pytest.raises(ValueError, match="at least 4 images; got 3"):
        gram(noise(3, 3))
    with pytest.raises(ValueError, match="no minibatch"):
        CkaTable().values()


# ---- attention


def test_uniform_attention_over_a_row_has_the_known_mean_distance() -> None:
    n, patch_px = 7, 16
    where = measures.places((1, n), patch_px)
    uniform = torch.full((2, 3, n, n), 1 / n)
    found = measures.mean_attention_distance(uniform, where, where)
    assert found.tolist() == pytest.approx([patch_px * (n * n - 1) / (3 * n)] * 3)


def test_attention_to_itself_has_distance_0_and_to_the_next_cell_its_side() -> None:
    where = measures.places((3, 4), 8)
    itself = torch.eye(12).expand(1, 2, 12, 12)
    assert measures.mean_attention_distance(itself, where, where).tolist() == [0, 0]
    right = torch.eye(12).view(12, 3, 4).roll(1, 2).view(12, 12)  # wraps around: three of four cells look 8 px, one 24
    assert measures.mean_attention_distance(right[None, None], where, where).item() == pytest.approx(12)
    half = 0.5 * right[None, None]  # the other half goes to a class token, which was left out
    assert measures.mean_attention_distance(half, where, where).item() == pytest.approx(12)


def test_keys_may_lie_on_a_coarser_grid() -> None:
    queries, keys = measures.places((2, 2), 8), measures.places((1, 1), 16)
    found = measures.mean_attention_distance(torch.ones(1, 1, 4, 1), queries, keys)
    assert found.item() == pytest.approx(4 * math.sqrt(2))


def test_entropy_of_attention() -> None:
    uniform, one = torch.full((1, 1, 5, 5), 0.2), torch.eye(5)[None, None]
    both = torch.cat([uniform, one], 1) * 0.5  # the other half goes to a class token
    assert measures.attention_entropy(both).tolist() == pytest.approx([1, 0])


def test_rollout_of_uniform_attention() -> None:
    """((I + J / n) / 2) ** L = I / 2**L + (1 - 1 / 2**L) J / n, since J / n is its own square."""
    n, layers = 5, 3
    uniform = torch.full((1, 4, n, n), 1 / n)
    found = measures.rollout([uniform] * layers)
    wanted = torch.eye(n) / 2**layers + (1 - 1 / 2**layers) / n
    assert torch.allclose(found[0].float(), wanted)
    itself = torch.eye(n).expand(2, 4, n, n)
    assert torch.equal(measures.rollout([itself] * layers), torch.eye(n, dtype=torch.float64).expand(2, n, n))


def test_rollout_multiplies_from_the_last_layer_to_the_first() -> None:
    first = torch.eye(3)[[1, 1, 2]][None, None]  # 0 attends to 1
    second = torch.eye(3)[[0, 1, 0]][None, None]  # then 2 attends to 0
    found = measures.rollout([first, second])[0]
    assert found[2].tolist() == pytest.approx([0.25, 0.25, 0.5]), "2 must see 1 through 0"


# ---- cosines


def test_cosine_map_of_sine_cosine_positions_is_known() -> None:
    """Each pair of a sine and a cosine contributes cos(rate × distance)."""
    dim, grid = 32, (3, 5)
    found = measures.cosine_map(sincos_positions(grid, dim))
    rates = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, cols = (measures.places(grid, 1).double()[:, i] for i in (0, 1))
    wanted = sum(
        torch.cos((axis[:, None] - axis[None, :])[..., None] * rates).mean(-1) for axis in (rows, cols)
    ) / 2  # fmt: skip
    assert torch.allclose(found, wanted, atol=1e-6)


def test_token_similarity() -> None:
    assert measures.token_similarity(torch.ones(2, 6, 3)) == pytest.approx(1)
    assert measures.token_similarity(torch.eye(4).expand(3, 4, 4)) == pytest.approx(0)
    half = torch.cat([torch.eye(4)[:2], torch.eye(4)[:2]])[None]  # 4 of 12 pairs are equal
    assert measures.token_similarity(half) == pytest.approx(1 / 3)


def test_by_distance_on_a_row() -> None:
    where = measures.places((1, 4), 16)
    values = torch.cdist(where, where) ** 2
    found = measures.by_distance(values, where, 16)
    assert found.distance_px == pytest.approx([16, 32, 48])
    assert found.value == pytest.approx([16**2, 32**2, 48**2])


def origins(tokens: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    table = CkaTable()
    table.add(measures.grams(tokens), measures.grams(patches))
    return table.values()


def test_tokens_that_copy_their_place_are_localised_and_pooled_ones_are_not() -> None:
    patches = noise(40, 9, 6)
    own = origins(patches @ rotation(6), patches)
    assert own.diagonal().tolist() == pytest.approx([1] * 9, abs=1e-4)
    assert measures.localised(own) == 1
    assert measures.localised(origins(patches.roll(1, 1), patches)) == 0
    pooled = origins(patches.mean(1, keepdim=True).expand(-1, 9, -1), patches)
    assert torch.allclose(pooled[0], pooled[5]), "pooled tokens must be equally similar to every place"
    assert measures.localised(pooled) == pytest.approx(1 / 9)


# ---- components and spectrum


def test_components_of_what_lies_in_a_plane() -> None:
    a, b = F.one_hot(torch.tensor([2, 5]), 8).float()
    t = noise(100, 2)
    t = torch.linalg.qr(t - t.mean(0)).Q * torch.tensor([2.0, 1.0])  # uncorrelated, variances 4 : 1
    found = measures.components(t[:, :1] * a - t[:, 1:] * b + 7.0, 4)
    assert found.vectors.shape == (4, 8)
    assert found.vectors[0].tolist() == pytest.approx(a.tolist(), abs=1e-6), "the largest entry must be positive"
    assert found.vectors[1].tolist() == pytest.approx(b.tolist(), abs=1e-6)
    assert found.share.tolist() == pytest.approx([0.8, 0.2, 0, 0], abs=1e-6)


def test_components_keep_the_shape_of_filters() -> None:
    assert measures.components(noise(10, 3, 4, 4), 28).vectors.shape == (9, 3, 4, 4)


def test_colour_maps_find_the_three_maps_that_features_are_made_of() -> None:
    maps = torch.stack([noise(2, 6, 6, seed=i) for i in range(3)], 1)
    flat = maps.permute(0, 2, 3, 1).flatten(0, 2)
    flat = torch.linalg.qr(flat - flat.mean(0)).Q * torch.tensor([4.0, 2.0, 1.0])
    features = (flat @ rotation(8)[:3]).view(2, 6, 6, 8).permute(0, 3, 1, 2)
    found, share = measures.colour_maps(features)
    assert share == pytest.approx([16 / 21, 4 / 21, 1 / 21], abs=1e-5)
    assert found.shape == (2, 3, 6, 6)
    assert float(found.min()) == 0
    assert float(found.max()) == 1
    for channel in range(3):
        shown, true = found[:, channel].flatten(), flat[:, channel]
        middle = (shown > 0) & (shown < 1)
        both = torch.stack([shown[middle], true[middle].float()])
        assert abs(float(torch.corrcoef(both)[0, 1])) == pytest.approx(1, abs=1e-4)
    assert measures.colour_maps(noise(1, 2, 3, 3))[0].shape == (1, 3, 3, 3)


def test_spectrum_and_rank_of_equal_directions() -> None:
    x = torch.cat([torch.eye(6), -torch.eye(6)])
    assert measures.spectrum(x).tolist() == pytest.approx([1 / 6] * 6)
    assert effective_rank(x) == pytest.approx(6)
    assert effective_rank(torch.ones(9, 6)) == pytest.approx(1)


def test_share_of_the_image() -> None:
    per_image = torch.tensor([1.0, -1.0])[:, None, None].expand(2, 3, 4)
    assert image_share(per_image) == pytest.approx(1)
    assert image_share(torch.ones(2, 3, 4)) == pytest.approx(0)
    assert image_share(per_image + 1) == pytest.approx(0.5)
