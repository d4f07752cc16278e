"""Draw what an encoder learned, as pictures with numbers: the analyses of the ViT papers, for any model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mpp.data.decoding.decode import Box, centre_box, decode_crop
from mpp.data.readers import AllImages
from mpp.data.shards.reader import evenly
from mpp.drawing import plots
from mpp.encoders.resolve import decoding_of, for_channels
from mpp.encoders.sources import check_source, open_encoder
from mpp.errors import BadImage, MppWarning, UserError, one_line
from mpp.inspection import views
from mpp.inspection.measures import LEAST_IMAGES
from mpp.inspection.observing import InspectedEncoder, attend, see_all
from mpp.inspection.views import View
from mpp.runs.history import INSPECTION, INSPECTION_INDEX
from mpp.runs.records import timm_folder, write_json

ATTENTION_IMAGES = 16
"""Greatest number of images whose attention is recorded."""


@dataclass
class Inspection:
    """The result of `inspect_encoder`."""

    out: Path
    encoder: str
    images: int
    views: list[View]
    absent: dict[str, str]
    """Title of a view -> why this encoder does not have it"""

    def table(self) -> str:
        """Return the summaries as text for the terminal."""
        lines = [f"{view.title}: {view.summary}" for view in self.views]
        return "\n".join(lines + [f"{title}: not available: {why}" for title, why in self.absent.items()])


def _open(source: str, *, random: bool, device: torch.device, key: str) -> InspectedEncoder:
    """Open an encoder.

    Raises:
        UserError: If there is no such encoder, or it returns no feature maps, or its images cannot be read here.
    """
    check_source(source, key=key)
    torch.manual_seed(0)
    model = open_encoder(source, architecture=None, image_size=None, channels=None, pretrained=not random)
    model = model.eval().to(device)
    if not hasattr(model, "forward_intermediates") or not getattr(model, "feature_info", None):
        raise UserError(f"{key}: timm's {type(model).__name__} has no forward_intermediates: no layers to look at")
    channels, *size = model.pretrained_cfg["input_size"]
    mean, std = (
        torch.tensor(for_channels(model.pretrained_cfg[k], channels), device=device).view(-1, 1, 1)
        for k in ("mean", "std")
    )
    decoding = decoding_of(timm_folder(source) or Path(source), channels)
    return InspectedEncoder(source, model, (int(size[0]), int(size[1])), channels, mean, std, decoding)


def _centre(size: tuple[int, int], width: int, height: int) -> Box:
    return centre_box(width, height, size)


def _read(subjects: Sequence[InspectedEncoder], places: Sequence[str], count: int, shown: int) -> list[Tensor]:
    """Read up to `count` images for each encoder, as (n, C, H, W) in [0, 255]. Unreadable images are skipped.

    The first `shown` images of the result are spread evenly over all that were read.

    Raises:
        UserError: If too few images can be read.
    """
    decoded: list[list[Tensor]] = []
    faults: list[str] = []
    images = AllImages(places, "IMAGES", few=True)
    for number in evenly(len(images), count):
        try:
            data = images.read(number)
            decoded.append([decode_crop(data, partial(_centre, s.size), s.size, **s.decoding) for s in subjects])
        except BadImage as error:
            faults.append(f"{images.name(number)}: {error}")
    if len(decoded) < LEAST_IMAGES:
        first = f"; unreadable: {faults[0]}" if faults else ""
        raise UserError(f"IMAGES: at least {LEAST_IMAGES} readable images are needed; got {len(decoded)}{first}")
    if faults:
        warnings.warn(f"IMAGES: {len(faults)} cannot be read; the first: {faults[0]}", MppWarning, stacklevel=3)
    chosen = evenly(len(decoded), shown)
    order = chosen + [i for i in range(len(decoded)) if i not in chosen]
    return [torch.stack([images[i] for i in order]) for images in zip(*decoded, strict=True)]


def inspect_encoder(
    encoder: str | Path,
    places: Sequence[str],
    *,
    out: str | Path | None = None,
    compare: str | None = None,
    images: int = 128,
    shown: int = 4,
    random: bool = False,
) -> Inspection:
    """Draw the views of an encoder: PNG, SVG and JSON of each view, and `index.json`, in a folder.

    Args:
        encoder: A run, an export, or the name of a timm model.
        places: Shards, image files or folders of images.
        out: Folder to write. None means RUN/inspect for a run, else inspect/NAME. With random weights it is
            inspect/NAME-random.
        compare: Another encoder to compare with. None means no comparison.
        images: Number of images that are measured.
        shown: Number of images that are drawn.
        random: Whether both encoders get random weights, as a control.

    Returns:
        The views, and those that this encoder does not have.

    Raises:
        UserError: If anything is wrong that the user can correct.
    """
    source = str(encoder)
    folder = Path(out) if out is not None else _own_folder(source, random)
    if images < LEAST_IMAGES:
        raise UserError(f"images: at least {LEAST_IMAGES}; got {images}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subjects = [_open(source, random=random, device=device, key="encoder")]
    if compare is not None:
        subjects.append(_open(compare, random=random, device=device, key="--compare"))
    read = _read(subjects, places, images, shown)
    subject = subjects[0]
    try:
        seen = see_all(subjects, read, shown)
        attention = attend(subject, read[0][:ATTENTION_IMAGES], shown)
    except RuntimeError as error:  # out of memory, most often
        raise UserError(f"{source}: {one_line(error)}") from error
    titled_views: list[tuple[str, View | str]] = [
        ("Features as colours", views.colours(seen)),
        ("Map of images", views.image_map(seen, read[0])),
        ("Spectrum, rank and collapse", views.spectrum(seen)),
        ("Attention maps and rollout", views.attention_maps(subject, attention, read[0][:shown])),
        ("Mean attention distance", views.attention_distance(subject, attention)),
        ("Similarity of layers (linear CKA)", views.similarity(seen, subjects[1] if compare else None)),
        ("Skip connections", views.skips(seen)),
        ("Places of tokens", views.space(seen)),
        ("Position embeddings", views.positions(subject)),
        ("Filters of the patch embedding", views.filters(subject)),
    ]
    drawn = [view for _, view in titled_views if isinstance(view, View)]
    absent = {title: why for title, why in titled_views if isinstance(why, str)}
    _write(folder, source, len(read[0]), drawn, absent, random)
    return Inspection(folder, source, len(read[0]), drawn, absent)


def _own_folder(source: str, random: bool) -> Path:
    """Return the default folder. Views of random weights do not go into the folder of a run."""
    run = Path(source)
    return (
        run / INSPECTION
        if (run / "encoder").is_dir() and not random
        else Path(INSPECTION) / (run.name + "-random" * random)
    )


def _write(folder: Path, source: str, images: int, drawn: list[View], absent: dict[str, str], random: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for view in drawn:
            plots.save(view.figure, folder / f"{view.name}.png")
            (folder / f"{view.name}.svg").write_text(plots.svg(view.figure, view.name), encoding="utf-8")
            write_json(folder / f"{view.name}.json", view.numbers)
        write_json(
            folder / INSPECTION_INDEX,
            {
                "encoder": source,
                "random_weights": random,
                "images": images,
                "views": [
                    {"name": v.name, "title": v.title, "caption": v.caption, "summary": v.summary} for v in drawn
                ],
                "absent": absent,
            },
        )
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}") from error
