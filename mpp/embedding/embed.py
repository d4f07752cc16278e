"""Compute a vector for each image with a frozen encoder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mpp.data.centre_crops import CentreCrops, Crops
from mpp.data.loader import batches
from mpp.data.readers import AllImages
from mpp.embedding.vectors import Part, Parts, check_out, join
from mpp.encoders.resolve import decoding_of, for_channels
from mpp.encoders.sources import check_source, fingerprint_of_inputs, open_encoder
from mpp.encoders.timm_model import TimmModel
from mpp.errors import UserError, without_secrets
from mpp.evaluation.features import EncoderReader, Place
from mpp.evaluation.result import RESULT
from mpp.parallel.team import Team, start_team
from mpp.runs.loop_progress import LoopProgress
from mpp.runs.records import timm_folder

BATCHES_OF_A_PART = 16
"""Batches whose vectors are written together. An interrupted run repeats at most one part on each process (a guess)."""
OUT = Place("out", "own")
"""The output of the whole encoder, with its own pooling."""


class Embedded(NamedTuple):
    """Vectors of images."""

    names: list[str]
    """Names of the images that could be read, one for each row."""
    vectors: np.ndarray
    """(images, D) float32."""
    place: Place
    """Layer and pooling of the vectors."""
    chosen_by: str | None
    """The evaluation that chose the layer and pooling. None if they were given, or are the encoder's output."""
    unreadable: list[str]
    """A line for each image that could not be read."""


def embed(
    encoder: str,
    places: Sequence[str],
    out: Path | None = None,
    *,
    layer: int | None = None,
    pool: str | None = None,
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "auto",
) -> Embedded:
    """Compute a vector for each image, from one central crop. Every process calls this with the same arguments.

    The vectors are collected in the folder OUT.parts until all are there. If it is interrupted, the same call
    continues.

    Args:
        encoder: A run, an export, or the name of a timm model.
        places: Shards, image files or folders of images.
        out: File for the vectors, .npy or .parquet. None means that no file is written.
        layer: Number of the block or stage, from 1. None means the best one of `RUN/evaluation`, or without an
            evaluation the output of the encoder.
        pool: Pooling at `layer`: "mean" of the patch tokens, or class "token". None means "mean".
        batch_size: Images in the memory of the device at once.
        workers: Number of processes that read images. 0 means that this process reads.
        precision: "auto", "fp32", "tf32" or "bf16", as in a recipe.

    Raises:
        UserError: If something is wrong that the user can correct.
    """
    if out is not None:
        check_out(out)
    if pool is not None and layer is None:
        raise UserError("--pool: only with --layer")
    if layer is not None and layer < 1:
        raise UserError(f"--layer: {layer}: layers are counted from 1")
    if pool not in (None, "mean", "token"):
        raise UserError(f"--pool: expected mean or token; got {pool!r}")
    if batch_size < 1:
        raise UserError(f"--batch-size: at least 1; got {batch_size}")
    team = start_team(precision)
    if out is None and team.world > 1:
        raise UserError(f"embed: several processes need out, a file for the vectors; got {team.world} processes")
    check_source(encoder, key="encoder")
    images = AllImages(places, "IMAGES")
    model = open_encoder(encoder, architecture=None, image_size=None, channels=None, pretrained=True)
    place, chosen_by = choose_place(encoder, layer, pool)
    reader = open_reader(model, place, encoder).to(team.device)
    crops = open_crops(model, encoder, images)

    settings = {
        "inputs": fingerprint_of_inputs(images.fingerprint(), "", encoder),
        "encoder": encoder,
        "place": str(place),
        "precision": precision,
        "batch_size": batch_size,
    }
    with tempfile.TemporaryDirectory() as unnamed:
        parts = Parts(out.with_name(out.name + ".parts") if out is not None else Path(unnamed) / "parts")
        team.on_main(lambda: parts.begin(settings))
        starts = range(0, len(images), BATCHES_OF_A_PART * batch_size)
        missing = team.on_main(lambda: [part for part in range(len(starts)) if part not in parts])
        missing = missing[team.rank :: team.world]
        shown = LoopProgress().shown(missing, "part", len(missing)) if team.is_main else missing
        for part in shown:
            numbers = np.arange(starts[part], min(starts[part] + starts.step, len(images)))
            parts.write(part, compute(numbers, crops, reader, place, team, batch_size=batch_size, workers=workers))
        team.wait()
        return team.on_main(lambda: collect(parts, len(starts), out, images, place, chosen_by))


def choose_place(encoder: str, layer: int | None, pool: str | None) -> tuple[Place, str | None]:
    """Return the layer and pooling of the vectors, and the evaluation that chose them, if one did."""
    if layer is not None:
        return Place(str(layer), pool or "mean"), None
    evaluation = Path(encoder) / "evaluation" / RESULT
    try:
        best = json.loads(evaluation.read_text())["best"]["encoder"]
        chosen = best.get("knn") or best["linear"]
        return Place(chosen["layer"], chosen["pool"]), str(evaluation.parent)
    except (OSError, ValueError, KeyError, TypeError):
        return OUT, None


def open_reader(model: TimmModel, place: Place, encoder: str) -> EncoderReader:
    """Return a reader of the features at a place.

    Raises:
        UserError: If the encoder has no such layer or pooling.
    """
    channels = model.pretrained_cfg["input_size"][0]
    mean, std = (for_channels(model.pretrained_cfg[key], channels) for key in ("mean", "std"))
    depth = len(getattr(model, "feature_info", None) or [None])
    reader = EncoderReader(model, [depth if place == OUT else int(place.layer)], mean, std)
    if place.pool == "token" and not reader.class_token:
        raise UserError(f"--pool token: {encoder} has no class token; use mean")
    return reader


def open_crops(model: TimmModel, encoder: str, images: AllImages) -> CentreCrops:
    """Return the central crops of the images, decoded as those that the encoder was trained on."""
    channels, *size = model.pretrained_cfg["input_size"]
    fraction = float(model.pretrained_cfg.get("crop_pct") or 1.0)
    decoding = decoding_of(timm_folder(encoder) or Path(encoder), channels)
    return CentreCrops(images, (int(size[0]), int(size[1])), fraction, **decoding)


@torch.inference_mode()
def compute(
    numbers: np.ndarray,
    crops: CentreCrops,
    reader: EncoderReader,
    place: Place,
    team: Team,
    *,
    batch_size: int,
    workers: int,
) -> Part:
    """Compute the vectors of some images.

    Args:
        numbers: Numbers of the images, (n,) int64.
        crops: Dataset of the images.
        reader: Reader of the features.
        place: Layer and pooling.
        team: The processes; gives device and precision.
        batch_size: Images in the memory of the device at once.
        workers: Number of processes that read images.
    """
    keys = [numbers[i : i + batch_size].tolist() for i in range(0, len(numbers), batch_size)]
    kept, vectors, unreadable = list[np.ndarray](), list[np.ndarray](), list[str]()
    batch: Crops
    for of_batch, batch in zip(
        keys, batches(crops, keys, workers=workers, pin_memory=team.device.type == "cuda"), strict=True
    ):
        with team.autocast():
            features = reader(batch.images.to(team.device, non_blocking=True)).pooled[place]
        readable = batch.readable.numpy()
        kept.append(np.asarray(of_batch)[readable])
        vectors.append(features.float().cpu().numpy()[readable])
        unreadable += map(without_secrets, batch.bad)
    return Part(np.concatenate(kept), np.concatenate(vectors), unreadable)


def name_of(images: AllImages, number: int) -> str:
    """Return the name of an image, without the signature that the URL of a shard may have."""
    return without_secrets(images.name(number))


def collect(
    parts: Parts, count: int, out: Path | None, images: AllImages, place: Place, chosen_by: str | None
) -> Embedded:
    """Join the parts, write them to `out` if it is given, and delete them.

    Raises:
        UserError: If no image could be read, or the file cannot be written.
    """
    numbers, unreadable = list[np.ndarray](), list[str]()
    for i in range(count):
        part = parts.read(i)
        numbers.append(part.numbers)
        unreadable += part.unreadable
    names = [name_of(images, int(number)) for of_part in numbers for number in of_part]
    if not names:
        raise UserError(f"IMAGES: not one image can be read; the first: {unreadable[0]}")
    if out is not None:
        join(parts, count, len(names), out, partial(name_of, images))
    if out is not None and out.suffix == ".npy":
        vectors: np.ndarray = np.load(out, mmap_mode="r")
    else:
        vectors = np.concatenate([np.array(parts.read(i).vectors) for i in range(count)])
    parts.remove()
    return Embedded(names, vectors, place, chosen_by, unreadable)
