"""mpp: masked-patch pretraining of vision encoders on unlabeled images, fine-tuning, verified export::

    mpp.pretrain("recipes/pretrain/cifar10.yaml", out="runs/a", **{"optim.epochs": 10})
    mpp.finetune("recipes/finetune/cifar10.yaml", encoder="runs/a")
    mpp.evaluate("runs/a", **{"data.train": "labeled/train", "data.val": "labeled/val"})
    mpp.export("runs/a", "encoders/a")
    model = mpp.load_encoder("encoders/a")          # a plain timm model

Nothing heavy is imported before one of these is called.
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
# times as long as with threads that soon fall asleep; if nothing does, a short spin costs next to nothing
# (recipes/LOG.md). GNU's OpenMP reads this once, when torch is imported.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def pretrain(
    recipe: str | Path | Mapping[str, object] | PretrainRecipe,
    *,
    resume: str = "never",
    scale: str | None = None,
    **overrides: object,
) -> PretrainResult:
    """Masked-patch pretraining. `recipe`: a file, its keys, or a checked recipe; overrides are its dotted keys.

    resume: "never" (the run folder must be new), "auto" (go on from the newest checkpoint), or a checkpoint.
    scale: one of the recipe's own sets of overrides, such as "tiny".
    UserError for everything the user can correct.
    """
    from mpp.recipe.loading import checked
    from mpp.recipe.pretrain import PretrainRecipe

    checked_recipe = checked(recipe, PretrainRecipe, overrides, scale)  # mistakes are reported before torch is imported
    from mpp.pretraining import loop

    return loop.pretrain(checked_recipe, resume)


def finetune(
    recipe: str | Path | Mapping[str, object] | FinetuneRecipe,
    *,
    resume: str = "never",
    scale: str | None = None,
    **overrides: object,
) -> FinetuneResult:
    """Fine-tuning on labeled images, beside the same from scratch. Arguments as in `pretrain`."""
    from mpp.recipe.finetune import FinetuneRecipe
    from mpp.recipe.loading import checked

    checked_recipe = checked(recipe, FinetuneRecipe, overrides, scale)
    from mpp.finetuning import run

    return run.finetune(checked_recipe, resume)


def evaluate(
    encoder: str | Path | None = None,
    *,
    recipe: str | Path | Mapping[str, object] | EvaluateRecipe | None = None,
    resume: str = "never",
    scale: str | None = None,
    **overrides: object,
) -> EvaluateResult:
    """kNN, linear and attentive probes of a frozen encoder over layers and poolings, beside controls.

    encoder: a run, an export or a name of timm's; None: the recipe's. Other arguments as in `pretrain`;
    `data.train` and `data.val` are all that has no default.
    """
    from mpp.recipe.evaluate import EvaluateRecipe
    from mpp.recipe.loading import checked

    if encoder is not None:
        overrides = {"encoder": Path(encoder), **overrides}
    checked_recipe = checked(recipe or {"job": "evaluate"}, EvaluateRecipe, overrides, scale)
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
    """What a fine-tuned encoder says of image files or folders: rows, what could not be read, and the report.

    views: 1, 2 (mirrored) or 10 (corners). top: classes named in a row. out: a CSV file. report: a folder for the
    confusion matrix and the worst mistakes, where images lie in class folders.
    """
    if views not in (1, 2, 10):
        raise UserError(f"views: {views}; allowed: 1, 2, 10")
    require_existing(encoder, *images)
    encoder_folder(encoder)
    from mpp.finetuning import predict_images as predicting

    return predicting.predict_files(encoder, images, views=views, top=top, out=out, report=report)  # type: ignore[arg-type]


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
    """What an encoder learned, seen through images: attention, similarity of layers, spectrum, positions, filters.

    places: shards, image files or folders. compare: another encoder. images: how many are measured, shown: drawn.
    random: with random weights, as a control. PNG, SVG and JSON of each view go to `out`, default RUN/inspect.
    """
    from mpp.inspection import run as inspection

    return inspection.inspect_encoder(
        encoder, places, out=out, compare=compare, images=images, shown=shown, random=random
    )


def report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write one HTML page about runs, from their records alone, and return its path.

    runs: a pretraining run with the fine-tunes and evaluations of its encoder, or several runs to compare.
    """
    from mpp.reporting.page import report

    return report([runs] if isinstance(runs, str | Path) else runs, out)


def replay(run: str | Path, step: int | None = None) -> Replayed:
    """Run a step of a run again whose loss or gradient was not finite. step: which; default: the last that was kept."""
    from mpp.inspection import replay as replaying

    return replaying.replay(run, step)


def plan(
    recipe: str | Path | Mapping[str, object] | PretrainRecipe,
    *,
    devices: int = 1,
    device: str = "a100",
    mfu: float | None = None,
    images: int | None = None,
    scale: str | None = None,
    **overrides: object,
) -> Plan:
    """What pretraining will take on so many devices of a kind: memory, time, disk. Nothing is trained.

    device: a name, or "cpu": this one. mfu: the part of their peak that it reaches. images: how many there are; None:
    the data are opened. UserError.
    """
    from mpp.recipe.loading import checked
    from mpp.recipe.pretrain import PretrainRecipe

    checked_recipe = checked(recipe, PretrainRecipe, overrides, scale)
    from mpp.planning import plan as planning

    return planning.plan(checked_recipe, devices=devices, device=device, mfu=mfu, images=images)


def export(run: str | Path, out: str | Path, format: str = "timm") -> Verified:
    """Write the encoder of a run into a new folder and verify it there. UserError where it does not hold.

    format: timm, transformers, safetensors, onnx or torch_export.
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
    """Verify an export and send it to a Hugging Face hub, as OWNER/NAME; -> its address. UserError."""
    require_existing(folder)
    from mpp.exchange import upload as uploading

    return uploading.upload(folder, repository, public=public)


def import_weights(file: str | Path, out: str | Path, **options: Any) -> Imported:
    """Weights from elsewhere, a file or a folder of transformers' or timm's, as a verified folder of a timm model.

    Options: model, args, image_size, channels, mean, std, prefix, partial, trust; see `mpp.exchange.import_weights`.
    UserError where any of the encoder's weights is not there as it should be.
    """
    require_existing(file)
    check_new(Path(out))
    from mpp.exchange.import_weights import import_weights

    return import_weights(file, out, **options)


def verify(folder: str | Path) -> Verified:
    """Load an export in a clean process, as its users do, and compare. UserError where anything differs."""
    from mpp.exchange.verify import is_timm_export, verify_timm_folder

    if is_timm_export(folder):
        return verify_timm_folder(folder)
    from mpp.exchange import convert as converting

    return converting.verify(folder)


def load_encoder(source: str | Path, **timm_args: Any) -> nn.Module:
    """A plain timm model with the weights of a run or an export; `timm_args` such as num_classes, img_size."""
    from mpp.encoders.sources import load_encoder

    return load_encoder(source, **timm_args)


def load_recipe(path: str | Path, *, scale: str | None = None, **overrides: object) -> Job:
    """Read and check a recipe of any job. UserError with a line for each thing that is wrong."""
    from mpp.recipe.loading import load_any

    return load_any(path, overrides, scale)


__all__ = [
    "BadImage",
    "MppWarning",
    "UserError",
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
