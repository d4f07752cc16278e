"""Make the views of an encoder: a picture with its numbers from each kind of recorded data.

If an encoder has no such data (for example attention in a convolutional network), the function returns the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpp.data.shards.reader import evenly
from mpp.drawing import plots
from mpp.drawing.pixels import as_rgb
from mpp.drawing.plots import Dots, Heat, Level, Line, Picture
from mpp.errors import how_to_get
from mpp.evaluation.rank import effective_rank
from mpp.inspection import measures
from mpp.inspection.observing import Attention, InspectedEncoder, Seen
from mpp.inspection.reading import TokenPlaces, patch_filters, position_table
from mpp.recipe.flat import JsonObject

if TYPE_CHECKING:
    from mpp.drawing.plots import Figure

SHOWN_PLACES = 8
"""Most rows and columns of places whose similarities are drawn."""
SHOWN_FILTERS = 28
"""Most principal components of filters that are drawn, as in Dosovitskiy et al. 2021, figure 7."""
SHOWN_LAYERS = 4
MOST_ON_MAP, THUMBNAIL_PX = 200, 40
"""Most images on the map, and the longer side of each."""
LEAST_SPREAD = 1e-4
"""Least range of any number of the features, of unit length, over the images of a map (a guess)."""


@dataclass
class View:
    """One picture with its numbers."""

    name: str
    title: str
    caption: str
    """How to read the picture."""
    numbers: JsonObject
    figure: Figure
    summary: str
    """One line with the main numbers, which is also the alternative text of the picture."""


def image_map(seen: Seen, images: Tensor) -> View | str:
    """Draw images at places in a plane where similar features are near each other.

    Args:
        seen: What was recorded of the images.
        images: (n, C, H, W) all images, in the order in which they were recorded.
    """
    try:
        from sklearn.manifold import TSNE
    except ModuleNotFoundError:
        return f"it needs scikit-learn: {how_to_get('map')}"
    features = F.normalize(torch.cat(seen.layers[-1].pooled).float(), dim=1).cpu().numpy()
    if not np.isfinite(features).all() or np.ptp(features, axis=0).max() < LEAST_SPREAD:
        return "its features are the same for all images, or not finite"  # t-SNE would divide by their spread
    perplexity = min(30.0, (len(features) - 1) / 3)
    at = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(features)
    drawn = evenly(len(at), MOST_ON_MAP)
    shape = [max(round(THUMBNAIL_PX * side / max(images.shape[-2:])), 1) for side in images.shape[-2:]]
    thumbnails = [F.interpolate(as_rgb(images[i])[None].float(), shape, mode="area")[0].byte() for i in drawn]
    return View(
        "image_map",
        "Map of images",
        f"Images whose features in the last {layer_word(seen)} are similar lie near each other (t-SNE of their means "
        "over all places, van der Maaten & Hinton 2008). Check whether neighbours show the same kind of object. With "
        "random weights, they mostly have the same colours and brightness. Distances between groups mean little.",
        {"places": _rounded(at), "perplexity": perplexity},
        plots.thumbnails(at[drawn], [_pixels(image) for image in thumbnails]),
        f"{len(drawn)} of {len(at)} images by the features of the last {layer_word(seen)}",
    )


def positions(subject: InspectedEncoder) -> View | str:
    position_embedding = position_table(subject.model, subject.size)
    if isinstance(position_embedding, str):
        return position_embedding
    table, (gh, gw) = position_embedding
    if gh * gw == 1:
        return "the image is a single patch"
    similar = measures.cosine_map(table).cpu()
    where = measures.places((gh, gw), subject.size[0] / gh)
    curve = measures.by_distance(similar, where, subject.size[0] / gh)
    rows, cols = (evenly(n, SHOWN_PLACES) for n in (gh, gw))
    grid = [[Picture(similar[r * gw + c].view(gh, gw).numpy()) for c in cols] for r in rows]
    near, far = curve.value[0], curve.value[-1]
    return View(
        "positions",
        "Position embeddings",
        "Each small map belongs to one patch and is drawn at its place. It shows how similar (cosine) the position "
        "embedding of that patch is to all others. A bright spot that follows the patch: nearby places have "
        "similar embeddings. Bright rows and columns: the encoder tells rows and columns apart.",
        {"grid": [gh, gw], "distance_px": curve.distance_px, "mean_cosine": curve.value, "cosine": _rounded(similar)},
        plots.pictures(
            grid,
            title="position of each patch compared with all others: cosine, -1 dark to 1 bright",
            low=-1,
            high=1,
            side=0.75,
        ),
        f"mean cosine {near:.2f} to the next cell, {far:.2f} to the farthest",
    )


def filters(subject: InspectedEncoder) -> View | str:
    weight = patch_filters(subject.model)
    if isinstance(weight, str):
        return weight
    principal = measures.components(weight, SHOWN_FILTERS)
    shown = []
    for vector in principal.vectors.cpu():
        colours = vector[:3] if len(vector) >= 3 else vector[:1].expand(3, -1, -1)
        span = colours.abs().max().clamp_min(1e-12)
        shown.append(Picture((0.5 + 0.5 * colours / span).permute(1, 2, 0).float().numpy()))
    rows = [shown[i : i + 7] for i in range(0, len(shown), 7)]
    share = principal.share.tolist()
    return View(
        "filters",
        "Filters of the patch embedding",
        "The main patterns (principal components) of the first layer's filters, the largest first; grey is zero. "
        "Waves of growing frequency and colour contrasts: the filters describe the content of a patch. Noise: the "
        "layer has hardly learned.",
        {"filters": len(weight), "size_px": list(weight.shape[2:]), "share_of_variance": share},
        plots.pictures(rows, title="principal components of the first layer's filters", side=0.8),
        f"{len(share)} components of {len(weight)} filters hold {sum(share):.0%} of their variance",
    )


def attention_distance(subject: InspectedEncoder, attentions: list[Attention]) -> View | str:
    if not attentions:
        return f"{type(subject.model).__name__} has no attention layers"
    of_block, distance, entropy, uniform = [], [], [], []
    for i, a in enumerate(attentions):
        if isinstance(a.layout, TokenPlaces) and a.distance is not None and a.entropy is not None:
            of_block.append(i + 1)
            distance.append(a.distance.tolist())
            entropy.append(a.entropy.tolist())
            even = torch.full((1, 1, len(a.layout.queries), len(a.layout.keys)), 1.0)
            uniform.append(float(measures.mean_attention_distance(even, a.layout.queries, a.layout.keys)))
    if not of_block:
        return str(attentions[0].layout)
    x = [i for i, heads in zip(of_block, distance, strict=True) for _ in heads]
    mean = [float(np.mean(heads)) for heads in distance]
    numbers: JsonObject = {
        "block": of_block,
        "distance_px": distance,
        "uniform_distance_px": uniform,
        "entropy": entropy,
    }
    left_out = len(attentions) - len(of_block)
    if left_out:
        numbers["left_out"] = left_out
    figure = plots.lines(
        {
            "attention distance of a head, px": [
                Dots("a head", x, [d for heads in distance for d in heads]),
                Line("mean", of_block, mean),
                Line("even attention", of_block, uniform, dashed=True),
            ],
            "entropy of its attention, 1 is even": [Dots("a head", x, [e for heads in entropy for e in heads])],
        },
        xlabel="block",
        limits={"attention distance of a head, px": (0, None), "entropy of its attention, 1 is even": (0, 1.05)},
        shared=False,
        height=3.2,
    )
    return View(
        "attention_distance",
        "Mean attention distance",
        "How far each head of each block looks: the distance between patches, weighted by attention. In trained "
        "ViTs, some heads of the first blocks look near and others far. If all are at the dashed line, attention "
        "is even, as in an untrained encoder.",
        numbers,
        figure,
        f"{mean[0]:.1f} px in the first block, {mean[-1]:.1f} px in the last (even attention: {uniform[-1]:.1f} px)",
    )


def attention_maps(subject: InspectedEncoder, attentions: list[Attention], shown: Tensor) -> View | str:
    if not attentions:
        return f"{type(subject.model).__name__} has no attention layers"
    layouts = [a.layout for a in attentions if isinstance(a.layout, TokenPlaces) and a.layout.everywhere]
    if len(layouts) < len(attentions) or len({(layout.grid, layout.prefix) for layout in layouts}) > 1:
        return f"{type(subject.model).__name__} has blocks in which a patch attends only to some of the others"
    layout = layouts[0]
    gh, gw = layout.grid
    layers = evenly(len(attentions), 3)
    whole = [torch.cat(a.whole) for a in attentions]  # (shown, T, T)
    through = measures.rollout([w.unsqueeze(1) for w in whole])
    query = (gh // 2) * gw + gw // 2
    at = ((gh // 2 + 0.5) / gh, (gw // 2 + 0.5) / gw)
    rows, of_rollout = [], []
    for i, image in enumerate(shown[: len(whole[0])]):
        picture = _pixels(image)
        row = [Picture(picture, "image" if i == 0 else "", at=at)]
        for layer in layers:
            weights = whole[layer][i, layout.prefix :, layout.prefix :][query].view(gh, gw)
            row.append(Picture(picture, f"block {layer + 1}" if i == 0 else "", over=weights.numpy(), at=at))
        rolled = through[i, layout.prefix :, layout.prefix :]
        of_rollout.append(rolled[query].view(gh, gw))
        row.append(Picture(picture, "rollout" if i == 0 else "", over=of_rollout[-1].numpy(), at=at))
        row.append(
            Picture(
                picture, "rollout, all\nplaces" if i == 0 else "", over=rolled.mean(0).view(gh, gw).numpy()
            )
        )  # fmt: skip
        rows.append(row)
    kept_share = float(torch.stack([r.flatten()[query] / r.sum() for r in of_rollout]).mean())
    return View(
        "attention_maps",
        "Attention maps and rollout",
        "What the patch at the cross attends to, mean over heads, in the first, a middle and the last block, each "
        "on its own scale. The last columns follow attention through all blocks (attention rollout), from the "
        "cross and from all patches.",
        {
            "query": [gh // 2, gw // 2],
            "grid": [gh, gw],
            "rollout": [_rounded(r, 5) for r in of_rollout],
            "own_share": kept_share,
        },
        plots.pictures(rows, title="attention of the patch at the cross"),
        f"through all blocks the patch keeps {kept_share:.0%} of its attention on itself",
    )


def similarity(seen: Seen, other: InspectedEncoder | None) -> View:
    cka = seen.own.values().cpu().numpy()
    panels = [Heat("layers", cka, "block", "block")]
    numbers: JsonObject = {"blocks": seen.block_names, "cka": _rounded(cka)}
    if seen.updates:
        updates = seen.own_updates.values().cpu().numpy()
        panels.append(Heat("what each block adds", updates, "block", "block"))
        numbers["blocks_with_skip"] = [seen.block_names[i] for i in seen.updates]
        numbers["cka_without_skip"] = _rounded(updates)
    if other is not None and seen.other is not None and seen.cross is not None and seen.cross_updates is not None:
        theirs, cross = (t.values().cpu().numpy() for t in (seen.other, seen.cross))
        panels += [Heat("the other's layers", theirs, "block", "block")]
        panels += [Heat("its layers, the other's", cross, "block of the other", "block")]
        numbers |= {"other": other.name, "cka_other": _rounded(theirs), "cka_cross": _rounded(cross)}
        between = seen.cross_updates.values().cpu().numpy() if seen.cross_updates.added else np.full((1, 1), np.nan)
        if np.isfinite(between).any():  # all nan if the residual branches are zero
            panels.append(Heat("what each adds, the other's", between, "block of the other", "block"))
            numbers["cka_cross_without_skip"] = _rounded(between)
    ends = float(cka[0, -1])
    return View(
        "similarity",
        "Similarity of layers (linear CKA)",
        "1: two layers hold the same information up to a rotation. 0: they have nothing in common. One bright "
        "square: all layers are similar, which is common in ViTs, whose skip connections carry information past "
        "the blocks. Squares along the diagonal: stages, which are common in convolutional networks. What each "
        "block adds is its output minus its input, without the skip connection.",
        numbers,
        plots.heats(panels, low=0, high=1, label="CKA", columns=min(len(panels), 3)),
        f"first and last of {len(cka)} blocks: {ends:.2f}, mean of all pairs {float(np.nanmean(cka)):.2f}",
    )


def skips(seen: Seen) -> View | str:
    if not seen.updates:
        return "it has no blocks with skip connections"
    adding = [i for i in seen.updates if seen.skip_over_branch[i]]
    if not adding:
        return "its blocks add almost nothing to their input, because the weights of their last layers are nearly zero"
    x = [i + 1 for i in adding]
    ratio = [float(np.mean(seen.skip_over_branch[i])) for i in adding]
    return View(
        "skips",
        "Skip connections",
        "How much a skip connection carries past a block, compared with what the block adds: the norm of its input "
        "over the norm of output minus input. Above 1, the block changes little. A peak marks a block that mostly "
        "passes its input through. Blocks that add nothing are left out.",
        {"block": x, "blocks": [seen.block_names[i] for i in adding], "skip_over_branch": ratio},
        plots.lines(
            {"carried on / added": [Line("", x, ratio), Level("as much", 1.0)]},
            xlabel="block",
            height=3.0,
            limits={"carried on / added": (0, None)},
        ),
        f"{min(ratio):.1f} to {max(ratio):.1f}",
    )


def space(seen: Seen) -> View:
    layers = evenly(len(seen.layers), SHOWN_LAYERS)
    origin = [layer.origin.values().nan_to_num(0.0).cpu() for layer in seen.layers]
    local = [measures.localised(o) for o in origin]
    curves: list[Line] = []
    numbers: JsonObject = {"localised": local, "grid": seen.grids, "cosine_by_distance": []}
    for i, layer in enumerate(seen.layers):
        step = seen.subject.size[0] / seen.grids[i][0]
        mean = torch.stack(layer.cosines).mean(0).cpu()
        curve = measures.by_distance(mean, measures.places(seen.grids[i], step), step)
        numbers["cosine_by_distance"].append(curve._asdict())
        if i in layers:
            curves.append(Line(f"{layer_word(seen)} {i + 1}", curve.distance_px, curve.value))
    x = list(range(1, len(seen.layers) + 1))
    return View(
        "space",
        "Places of tokens",
        "Left: cosine of two patches of an image by their distance, without what all patches share. If the line "
        "falls, nearby patches are similar and distant ones differ. If it is flat at 1, all patches hold the same. "
        "Right: fraction of tokens that resemble the pixels at their own place more than those anywhere else (CKA "
        "over images). It falls if places mix.",
        numbers,
        plots.lines(
            {"cosine of two patches": curves, "tokens that match their place": [Line("", x, local)]},
            xlabel=("distance, px", layer_word(seen)),
            limits={"tokens that match their place": (0, 1.05)},
            shared=False,
            height=3.2,
        ),
        f"{local[0]:.0%} of the tokens match their place in the first {layer_word(seen)}, {local[-1]:.0%} in the last",
    )


def spectrum(seen: Seen) -> View:
    pooled = [torch.cat(layer.pooled) for layer in seen.layers]
    spectra = [measures.spectrum(p) for p in pooled]
    rank = [effective_rank(p) for p in pooled]
    centred = [effective_rank(p - p.mean(0)) for p in pooled]
    similar = [float(np.mean(layer.raw_similarity)) for layer in seen.layers]
    without_mean = [measures.off_diagonal(torch.stack(layer.cosines).mean(0)) for layer in seen.layers]
    x = list(range(1, len(pooled) + 1))
    curves = []
    for i in evenly(len(pooled), SHOWN_LAYERS):
        kept = [v for v in spectra[i].tolist() if v > 1e-9]
        curves.append(Line(f"{layer_word(seen)} {i + 1}", list(range(1, len(kept) + 1)), kept))
    return View(
        "spectrum",
        "Spectrum, rank and collapse",
        "Left: variance of the features of an image (mean of its patches) along their principal components. If the "
        "line drops to zero after a few components, the features have collapsed. Middle: the effective number of "
        "directions (effective rank); RankMe does not subtract the mean. Right: mean cosine of the patches of one "
        "image; at 1, all hold the same.",
        {
            "images": len(pooled[0]),
            "width": [p.shape[1] for p in pooled],
            "rank": centred,
            "rankme": rank,
            "token_similarity": similar,
            "token_similarity_without_mean": without_mean,
            "spectrum": [_rounded(s, 8) for s in spectra],
        },
        plots.lines(
            {
                "share of the variance": curves,
                "effective rank": [Line("centred", x, centred), Line("RankMe", x, rank, dashed=True)],
                "similarity of patches": [
                    Line("without the mean", x, without_mean),
                    Line("raw", x, similar, None, True),
                ],
            },
            xlabel=("component", layer_word(seen), layer_word(seen)),
            shared=False,
            height=3.2,
            limits={"effective rank": (0, None)},
            log_y_of=("share of the variance",),
        ),
        f"effective rank of the last {layer_word(seen)} {centred[-1]:.1f} of {pooled[-1].shape[1]} "
        f"(RankMe {rank[-1]:.1f}), over {len(pooled[0])} images",
    )


def colours(seen: Seen) -> View:
    layers = evenly(len(seen.shown_maps), SHOWN_LAYERS)
    moved = {i: seen.shown_maps[i].float() - seen.layers[i].mean_map for i in layers}
    coloured = {i: measures.colour_maps(moved[i]) for i in layers}
    rows = []
    for r, image in enumerate(seen.shown):
        row = [Picture(_pixels(image), "image" if r == 0 else "")]
        row += [
            Picture(coloured[i][0][r].permute(1, 2, 0).cpu().numpy(), f"{layer_word(seen)} {i + 1}" if r == 0 else "")
            for i in layers
        ]
        rows.append(row)
    last = coloured[layers[-1]][1]
    return View(
        "colours",
        "Features as colours",
        "The first three principal components of the patch features of all images as red, green and blue. The mean "
        "of all images at each place is subtracted, since it mostly holds the position. Parts of the same colour "
        "in one column are similar to the encoder.",
        {"layers": [i + 1 for i in layers], "share_of_variance": [coloured[i][1] for i in layers]},
        plots.pictures(rows, title="principal components of patch features as colours"),
        f"three components hold {sum(last):.0%} of the variance of the last {layer_word(seen)}",
    )


def layer_word(seen: Seen) -> str:
    """Return "block" if all feature maps have the same size, else "stage"."""
    plain = len({tuple(m.shape[-2:]) for m in seen.shown_maps}) == 1
    return "block" if plain else "stage"


def _pixels(raw: Tensor) -> np.ndarray:
    """Convert a (C, H, W) image to (H, W, 3) in [0, 1]."""
    return (as_rgb(raw.cpu()).permute(1, 2, 0).float() / 255).numpy()


def _rounded(values: object, digits: int = 4) -> Any:
    array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    rounded = np.round(array.astype(float), digits).astype(object)
    rounded[~np.isfinite(array.astype(float))] = None  # JSON has no NaN
    return rounded.tolist()
