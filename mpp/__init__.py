"""Masked-patch pretraining of vision encoders on unlabeled images, fine-tuning and verified export::

    mpp.pretrain("recipes/pretrain/cifar10.yaml", out="runs/a", **{"optim.epochs": 10})
    mpp.finetune("recipes/finetune/cifar10.yaml", encoder="runs/a")
    mpp.evaluate("runs/a", **{"data.train": "labeled/train", "data.val": "labeled/val"})
    mpp.export("runs/a", "encoders/a")
    model = mpp.load_encoder("encoders/a")          # a plain timm model

Heavy packages such as torch are imported only when one of these functions is called.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpp.errors import BadImage, MppWarning, UserError, require_existing
from mpp.recipe.flat import JsonObject
from mpp.runs.records import check_new, encoder_folder

if TYPE_CHECKING:
    from torch import nn

    from mpp.data.near_duplicates import NearDuplicates
    from mpp.embedding.embed import Embedded
    from mpp.evaluation.result import EvaluateResult
    from mpp.exchange.import_weights import Imported
    from mpp.exchange.verify import Verified
    from mpp.finetuning.predict_images import Report
    from mpp.finetuning.run import FinetuneResult
    from mpp.inspection.replay import Replayed
    from mpp.inspection.run import Inspection
    from mpp.planning.plan import Plan
    from mpp.pretraining.loop import PretrainResult
    from mpp.recipe.evaluate import EvaluateRecipe
    from mpp.recipe.finetune import FinetuneRecipe
    from mpp.recipe.pretrain import PretrainRecipe
    from mpp.recipe.sections import Job

__version__ = "0.1.0"

# torch's threads spin while they wait for each other. If other work shares the cores, a step then takes two to four
# times as long as with threads that soon sleep. If the cores are free, a short spin costs next to nothing
# (recipes/LOG.md). GNU's OpenMP reads this variable once, when torch is imported.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def pretrain(
    recipe: str | Path | Mapping[str, object] | PretrainRecipe,
    *,
    resume: str = "never",
    preset: str | None = None,
    **overrides: object,
) -> PretrainResult:
    """Pretrain an encoder by predicting masked patches.

    Args:
        recipe: A file, a mapping of recipe keys, or a checked recipe.
        resume: "never" (the run folder must be new), "auto" (continue from the newest checkpoint), "overwrite" (delete
            the run in the run folder first), or the folder of a checkpoint.
        preset: Name of one of the recipe's presets, such as "tiny".
        **overrides: Dotted keys of the recipe and their values.

    Returns:
        The run folder and the last metrics.

    Raises:
        UserError: If something is wrong that the user can correct.
    """
    from mpp.recipe.loading import checked
    from mpp.recipe.pretrain import PretrainRecipe

    checked_recipe = checked(recipe, PretrainRecipe, overrides, preset)  # reports mistakes before torch is imported
    from mpp.pretraining import loop

    return loop.pretrain(checked_recipe, resume)


def finetune(
    recipe: str | Path | Mapping[str, object] | FinetuneRecipe,
    *,
    resume: str = "never",
    preset: str | None = None,
    **overrides: object,
) -> FinetuneResult:
    """Fine-tune an encoder on labeled images, and compare it with baselines such as the same encoder from scratch.

    Args:
        recipe: A file, a mapping of recipe keys, or a checked recipe.
        resume: "never" (the run folder must be new), "auto" (continue from the newest checkpoint), "overwrite" (delete
            the run in the run folder first), or the folder of a checkpoint.
        preset: Name of one of the recipe's presets.
        **overrides: Dotted keys of the recipe and their values.

    Returns:
        Scores of each approach over the seeds, with intervals.

    Raises:
        UserError: If something is wrong that the user can correct.
    """
    from mpp.recipe.finetune import FinetuneRecipe
    from mpp.recipe.loading import checked

    checked_recipe = checked(recipe, FinetuneRecipe, overrides, preset)
    from mpp.finetuning import run

    return run.finetune(checked_recipe, resume)


def evaluate(
    encoder: str | Path | None = None,
    *,
    recipe: str | Path | Mapping[str, object] | EvaluateRecipe | None = None,
    resume: str = "never",
    preset: str | None = None,
    **overrides: object,
) -> EvaluateResult:
    """Probe a frozen encoder (kNN, linear, attentive) over its layers and poolings, and compare it with controls.

    Args:
        encoder: A run, an export, or a timm name. None means the encoder in the recipe.
        recipe: A file, a mapping of recipe keys, or a checked recipe. Without a recipe, only `data.train` and
            `data.val` have no default.
        resume: "never", "auto" or "overwrite".
        preset: Name of one of the recipe's presets.
        **overrides: Dotted keys of the recipe and their values.

    Returns:
        Scores of the encoder, of the same architecture with random weights, and of raw pixels.

    Raises:
        UserError: If something is wrong that the user can correct.
    """
    from mpp.recipe.evaluate import EvaluateRecipe
    from mpp.recipe.loading import checked

    if encoder is not None:
        overrides = {"encoder": Path(encoder), **overrides}
    checked_recipe = checked(recipe or {"job": "evaluate"}, EvaluateRecipe, overrides, preset)
    from mpp.evaluation import run

    return run.evaluate(checked_recipe, resume)


def predict(
    encoder: str | Path,
    images: Sequence[str],
    *,
    views: int = 1,
    top: int = 1,
    out: str | Path | None = None,
    report: str | Path | None = None,
) -> tuple[list[JsonObject], dict[str, str], Report | None]:
    """Predict image files, or the images of folders, with a fine-tuned encoder.

    Args:
        encoder: A fine-tuned model, such as RUN/pretrained-seed0, or its export.
        images: Image files and folders of images.
        views: Number of views of each image to average: 1, 2 (adds a mirror image) or 10 (adds corners).
        top: Number of classes in each row.
        out: CSV file for the rows. None means that no file is written.
        report: Folder for the confusion matrix and the worst mistakes. The images must be in class folders.

    Returns:
        A row for each image, the reason for each image that could not be read, and the report if `report` was given.

    Raises:
        UserError: If something is wrong that the user can correct.
    """
    if views not in (1, 2, 10):
        raise UserError(f"views: expected 1, 2 or 10; got {views}")
    require_existing(encoder, *images)
    encoder_folder(encoder)
    from mpp.finetuning import predict_images as predicting

    return predicting.predict_files(encoder, images, views=views, top=top, out=out, report=report)  # type: ignore[arg-type]


def embed(
    encoder: str | Path,
    images: Sequence[str],
    out: str | Path | None = None,
    *,
    layer: int | None = None,
    pool: str | None = None,
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "auto",
) -> Embedded:
    """Compute a feature vector for each image with a frozen encoder.

    Args:
        encoder: A run, an export, or a timm name.
        images: Shards, image files or folders of images.
        out: File for the vectors, .npy or .parquet. None means that no file is written.
        layer: Block or stage to read, from 1. None means the best one of RUN/evaluation, or without an evaluation the
            output of the encoder.
        pool: Pooling at `layer`: "mean" of the patches (the default) or class "token".
        batch_size: Images in the memory of the device at once.
        workers: Number of processes that read images. 0 means that this process reads.
        precision: "auto", "fp32", "tf32" or "bf16", as in a recipe.

    Returns:
        The names of the images, their vectors (images, D) float32, and a line for each unreadable image.

    Raises:
        UserError: If something is wrong that the user can correct.
    """
    places = _places(images)
    from mpp.embedding import embed as embedding

    return embedding.embed(
        str(encoder),
        places,
        None if out is None else Path(out),
        layer=layer,
        pool=pool,
        batch_size=batch_size,
        workers=workers,
        precision=precision,
    )


def duplicates(
    images: Sequence[str],
    against: Sequence[str] | None = None,
    out: str | Path | None = None,
    *,
    similarity: float | None = None,
    picture: str | Path | None = None,
    workers: int = 0,
) -> NearDuplicates:
    """Find images that show the same picture: encoded again, resized, slightly cropped, brighter or darker.

    Args:
        images: Shards, image files or folders of images.
        against: Other images, in the same form, with which `images` are compared. None: with each other.
        out: CSV file for the pairs. None means that none is written.
        similarity: Least similarity of a pair, at most 1. None means 0.87.
        picture: PNG for the least similar of the pairs. None means that none is drawn.
        workers: Number of processes that read images. 0 means that this process reads.

    Returns:
        The pairs, the most similar first.

    Raises:
        UserError: If something is wrong that the user can correct.
    """
    places, others = _places(images), None if against is None else _places(against)
    from mpp.data import near_duplicates as search

    return search.near_duplicates(
        places,
        others,
        out=None if out is None else Path(out),
        similarity=search.LIMIT if similarity is None else similarity,
        picture=None if picture is None else Path(picture),
        workers=workers,
    )


def _places(images: Sequence[str]) -> list[str]:
    """Return places as strings, after a check that those without patterns exist."""
    places = [os.fspath(place) for place in ([images] if isinstance(images, str | Path) else images)]
    require_existing(*(place for place in places if not any(mark in place for mark in ("://", *"*?{["))))
    return places


def inspect(
    encoder: str | Path,
    places: Sequence[str],
    *,
    out: str | Path | None = None,
    compare: str | None = None,
    images: int = 128,
    shown: int = 4,
    random: bool = False,
) -> Inspection:
    """Inspect an encoder on images: attention, similarity of layers, spectrum, positions, filters.

    Args:
        encoder: A run, an export, or a timm name.
        places: Shards, image files or folders of images.
        out: Folder for PNG, SVG and JSON of each view. None means RUN/inspect.
        compare: Another encoder to compare with.
        images: Number of images to measure.
        shown: Number of images to draw.
        random: Whether the encoder gets random weights, as a control.

    Returns:
        The numbers of each view.

    Raises:
        UserError: If something is wrong that the user can correct.
    """
    from mpp.inspection import run as inspection

    return inspection.inspect_encoder(
        encoder, places, out=out, compare=compare, images=images, shown=shown, random=random
    )


def report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write one HTML page about runs, using only their records.

    Args:
        runs: A pretraining run with the fine-tunes and evaluations of its encoder, or several runs to compare.
        out: The HTML file. None means report.html in the first run.

    Returns:
        The path of the file.

    Raises:
        UserError: If a folder is not a run, or `out` cannot be written.
    """
    from mpp.reporting.page import report

    return report([runs] if isinstance(runs, str | Path) else runs, out)


def replay(run: str | Path, step: int | None = None) -> Replayed:
    """Run a step again whose loss or gradient was not finite.

    Args:
        run: The run folder.
        step: Number of the step. None means the last step that was kept.
    """
    from mpp.inspection import replay as replaying

    return replaying.replay(run, step)


def plan(
    recipe: str | Path | Mapping[str, object] | PretrainRecipe,
    *,
    devices: int | None = None,
    device: str | None = None,
    mfu: float | None = None,
    images: int | None = None,
    preset: str | None = None,
    **overrides: object,
) -> Plan:
    """Estimate memory, time and disk of a pretraining run, without training.

    Args:
        recipe: A file, a mapping of recipe keys, or a checked recipe.
        devices: Number of devices. None means the recipe's.
        device: a100, h100, h200, l40s, a10, rtx4090, or "cpu" for this machine, whose steps are timed. None means the
            device of this machine.
        mfu: Fraction of a device's peak that training reaches. None means 0.3 (a guess); on a CPU, what timed steps
            reach.
        images: Number of images. None means that the data are opened and counted.
        preset: Name of one of the recipe's presets.
        **overrides: Dotted keys of the recipe and their values.

    Raises:
        UserError: If something is wrong that the user can correct.
    """
    from mpp.recipe.loading import checked
    from mpp.recipe.pretrain import PretrainRecipe

    checked_recipe = checked(recipe, PretrainRecipe, overrides, preset)
    from mpp.planning import plan as planning

    return planning.plan(
        checked_recipe, devices=devices or checked_recipe.devices, device=device, mfu=mfu, images=images
    )


def export(run: str | Path, out: str | Path, format: str = "timm") -> Verified:
    """Write the encoder of a run into a new folder and verify it in a clean process.

    Args:
        run: A run, a fine-tuned model such as RUN/pretrained-seed0, or an export.
        out: The new folder.
        format: Format of the export: timm, transformers, safetensors, onnx or torch_export.

    Raises:
        UserError: If verification fails, or `out` is not new or empty.
    """
    check_new(Path(out))
    encoder_folder(run)
    if format == "timm":
        from mpp.exchange import card as modelcard
        from mpp.exchange.verify import export_timm_folder

        return export_timm_folder(run, out, modelcard.sections(run))
    from mpp.exchange import convert as converting

    return converting.export(run, out, format)


def upload(folder: str | Path, repository: str, *, public: bool = False) -> str:
    """Verify an export and upload it to a Hugging Face hub.

    Args:
        folder: The export.
        repository: Name of the repository, OWNER/NAME. It is created if it does not exist.
        public: Whether a new repository is public.

    Returns:
        The address of the repository.

    Raises:
        UserError: If verification fails, or if the hub refuses the upload.
    """
    require_existing(folder)
    from mpp.exchange import upload as uploading

    return uploading.upload(folder, repository, public=public)


def import_weights(file: str | Path, out: str | Path, **options: Any) -> Imported:
    """Import weights as a verified folder of a timm model.

    Args:
        file: A file of weights, or a folder of transformers or timm.
        out: The new folder.
        **options: model, args, image_size, channels, mean, std, prefix, partial, trust; see
            `mpp.exchange.import_weights`.

    Raises:
        UserError: If a weight of the encoder is missing or does not fit.
    """
    require_existing(file)
    check_new(Path(out))
    from mpp.exchange.import_weights import import_weights

    return import_weights(file, out, **options)


def verify(folder: str | Path) -> Verified:
    """Load an export in a clean process, as its users do, and compare its outputs.

    Raises:
        UserError: If the outputs or a file differ, or if the export cannot be loaded.
    """
    from mpp.exchange.verify import is_timm_export, verify_timm_folder

    if is_timm_export(folder):
        return verify_timm_folder(folder)
    from mpp.exchange import convert as converting

    return converting.verify(folder)


def load_encoder(source: str | Path, **timm_args: Any) -> nn.Module:
    """Return a plain timm model with the weights of a run or an export.

    Args:
        source: Folder of the run or export.
        **timm_args: Arguments of the timm model, such as num_classes or img_size.
    """
    from mpp.encoders.sources import load_encoder

    return load_encoder(source, **timm_args)


def load_recipe(path: str | Path, *, preset: str | None = None, **overrides: object) -> Job:
    """Read and check a recipe of any job.

    Raises:
        UserError: If the recipe is wrong. The message has a line for each mistake.
    """
    from mpp.recipe.loading import load_any

    return load_any(path, overrides, preset)


__all__ = [
    "BadImage",
    "MppWarning",
    "UserError",
    "duplicates",
    "embed",
    "evaluate",
    "export",
    "finetune",
    "import_weights",
    "inspect",
    "load_encoder",
    "load_recipe",
    "plan",
    "predict",
    "pretrain",
    "replay",
    "report",
    "upload",
    "verify",
]
