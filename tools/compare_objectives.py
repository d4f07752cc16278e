"""Compare objectives and encoder families at equal CPU time: the table of docs/objectives.md.

    python tools/compare_objectives.py OUT [--only NAME …] [--minutes 6] [--seeds 0 …] [--each-pretrained]
    python tools/compare_objectives.py OUT --data shards/photos64 --image-size-px 64 …

Requires the shards train and test in the folder of --data, packed as recipes/pretrain/cifar10.yaml shows. Each row is
timed for some steps. Then it is pretrained for as many steps as fit into the minutes of one CPU core. Its frozen
features are probed with 500 labels per class. It is fine-tuned on 100 labels per class, and compared with the same from
scratch. Finished work is kept: an interrupted row is resumed, and a finished row takes more seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN, FINETUNE = (str(ROOT / "recipes" / job / "cifar10.yaml") for job in ("pretrain", "finetune"))
SIMMIM = {"corruption": "token", "mask.ratio": 0.6, "predict_fraction": 1.0}
MAE = {"corruption": "drop", "head": {"name": "transformer", "dim": 64}, "predict_fraction": 1.0}
MPP = {"corruption": "bert", "mask.ratio": 0.5, "predict_fraction": 1.0}
TEACHER_ROW = "late joining"
"""Row whose encoder is the frozen teacher. It needs no published weights, and neither encoder has seen a label."""
OWN_TEACHER = {"target": {"name": "teacher", "teacher": TEACHER_ROW, "layers": 4}, "loss": "smooth_l1"}
VISIBLE_ALONE = {
    "corruption": "drop", "head": {"name": "cross_attention", "dim": 64}, "predict_fraction": 0.34,
    "target": {"name": "ema_teacher", "layers": 4, "decay": 0.99}, "loss": "smooth_l1", "masks_per_image": 8,
}  # fmt: skip
"""Objective of data2vec 2.0 with CrossMAE's head: each image is encoded once for each of its masks."""
VIEWS = 4
VIEWS_AGREE: dict[str, Any] = {"agreement": {"views": VIEWS}, "data.color_jitter": 0.4, "data.grayscale": 0.2}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "late joining": {},
    "late joining, muon": {"optim.name": "muon"},
    "late joining, a third": {"predict_fraction": 0.34},
    "late joining by 2 blocks, a third": {"corruption.enter": 4, "predict_fraction": 0.34},
    "mae": MAE,
    "crossmae": {"corruption": "drop", "head": {"name": "cross_attention", "dim": 64}, "predict_fraction": 0.34},
    "simmim": SIMMIM,
    "mpp, mean_color": {**MPP, "target": "mean_color"},
    "mpp, downsized_color": {**MPP, "target": "downsized_color"},
    "mpp, pixels": {**MPP, "target": "pixels"},
    "hog": {**SIMMIM, "target": "hog", "mask": {"name": "block", "ratio": 0.4, "min_block": 4}},
    "hog, late joining": {"target": "hog"},
    "ema_teacher": {
        **SIMMIM,
        "mask": {"name": "block", "ratio": 0.6, "min_block": 4},
        "target": {"name": "ema_teacher", "layers": 4, "decay": 0.99},
        "loss": "smooth_l1",
    },
    "teacher": {**SIMMIM, **OWN_TEACHER, "mask": {"name": "block", "ratio": 0.6, "min_block": 4}},
    "teacher, late joining": OWN_TEACHER,
    "mae, green noise": {**MAE, "mask": "noise"},
    "mae, 2 complementary masks": {**MAE, "mask": {"name": "complementary", "ratio": 0.75}, "masks_per_image": 2},
    "ema_teacher, 8 masks": {**VISIBLE_ALONE, "mask": {"name": "inverse_block", "ratio": 0.75}},
    "ema_teacher, 8 complementary masks": {**VISIBLE_ALONE, "mask": {"name": "complementary", "ratio": 0.75}},
    "clusters, 8 masks": {
        **VISIBLE_ALONE,
        "mask": {"name": "inverse_block", "ratio": 0.75},
        "target": {"name": "clusters", "decay": 0.99},
        "loss": "kl",
    },
    "mae, 4 views agree": {**MAE, **VIEWS_AGREE},
    "late joining, 4 views agree": VIEWS_AGREE,
    "ema_teacher, late joining": {
        "target": {"name": "ema_teacher", "layers": 4, "decay": 0.99},
        "loss": "smooth_l1",
    },
}
"""Changes to recipes/pretrain/cifar10.yaml, by row."""
ENCODERS: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    "swin": (
        32, 4, "swin_tiny_patch4_window7_224",
        {"patch_size": 2, "embed_dim": 64, "depths": [2, 4], "num_heads": [2, 4], "window_size": 4},
    ),
    "hybrid": (32, 4, "vit_tiny_r_s16_p8_224", {"patch_size": 1, "embed_dim": 128, "depth": 6, "num_heads": 4}),
    "mixer": (64, 16, "mixer_s16_224", {}),
    "coatnet": (
        64, 8, "coatnet_nano_rw_224",
        {"embed_dim": [32, 64, 96, 128], "depths": [1, 2, 3, 2], "stem_width": [16, 32]},
    ),
    "pvt": (
        64, 8, "pvt_v2_b0", {"embed_dims": [32, 64, 96, 128], "depths": [2, 2, 2, 2], "num_heads": [1, 2, 3, 4]},
    ),
}  # fmt: skip
"""Image size and mask unit in pixels, timm model and its arguments, by row.

The objective is like SimMIM. Sizes above 32 px mean that the images are enlarged.
"""
TIMED_STEPS = 300
"""With fewer steps, measuring the skill at their end would be a good part of the time."""


def rows() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return the overrides of the pretraining and of the fine-tuning recipe, by row."""
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {name: (o, {}) for name, o in OBJECTIVES.items()}
    for name, (size_px, unit_px, model, args) in ENCODERS.items():
        changes = {
            **SIMMIM, "data.image_size": size_px, "encoder": {"name": model, "args": args},
            "mask": {"name": "uniform", "ratio": 0.6, "unit_px": unit_px},
        }  # fmt: skip
        del changes["mask.ratio"]
        found[f"simmim, {name}"] = (changes, {"data.image_size": size_px})
    return found


def run(job: str, recipe_or_encoder: str, changes: dict[str, Any]) -> dict[str, float]:
    """Run or resume a command on one core. Return its CPU and wall minutes, including those of earlier attempts."""
    record = Path(changes["out"] + ".minutes.json")
    spent = json.loads(record.read_text()) if record.exists() else {"cpu": 0.0, "wall": 0.0}
    status_file = Path(changes["out"]) / "status.json"
    if record.exists() and status_file.exists() and json.loads(status_file.read_text())["state"] == "finished":
        return spent
    words = [f"{k}={json.dumps(v)}" for k, v in changes.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mpp", job, recipe_or_encoder, *words, "--resume", "auto"]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    spent["cpu"] += (usage.ru_utime + usage.ru_stime) / 60
    spent["wall"] += (time.monotonic() - began) / 60
    record.write_text(json.dumps(spent))
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return spent


def folder_of(out: Path, row: str) -> Path:
    return out / row.replace(", ", "-").replace(" ", "-")


def do(
    name: str,
    out: Path,
    data: Path,
    image_size_px: int,
    minutes: float,
    finetune_steps: int,
    seeds: list[int],
    each_pretrained: bool,
) -> dict[str, Any]:
    """Pretrain, probe and fine-tune a row, and return its figures.

    Args:
        name: Name of the row.
        out: Folder of all rows.
        data: Folder of the shards train and test.
        image_size_px: Side of the images, for rows that do not have their own. The ViT has 8 × 8 patches at any size.
        minutes: CPU minutes of one pretraining.
        finetune_steps: Steps of one fine-tuning.
        seeds: Seeds of the fine-tuning.
        each_pretrained: Whether every seed has its own pretraining. Otherwise all share that of the recipe's seed.
    """
    pretraining, finetuning = rows()[name]
    if "encoder" not in pretraining:
        sized = {"data.image_size": image_size_px}
        pretraining = {**pretraining, **sized, "encoder.args.patch_size": image_size_px // 8}
        finetuning = {**finetuning, **sized}
    pretraining = {**pretraining, "data.shards": str(data / "train")}
    labeled = {"data.train": str(data / "train"), "data.val": str(data / "test")}
    folder = folder_of(out, name)
    target = pretraining.get("target")
    if isinstance(target, dict) and target.get("teacher") == TEACHER_ROW:
        teacher = folder_of(out, TEACHER_ROW) / "pretrain"
        if not (teacher / "encoder").exists():
            raise SystemExit(f"{name}: wants the row '{TEACHER_ROW}' done first: its encoder is the teacher")
        pretraining = {**pretraining, "target": {**target, "teacher": str(teacher)}}
    timed = {"optim.steps": TIMED_STEPS, "log_every_steps": TIMED_STEPS // 2, "out": str(folder / "timed")}
    spent = run("pretrain", PRETRAIN, {**pretraining, **timed, "checkpoint_every_steps": 10**6})
    last = json.loads((folder / "timed" / "metrics.jsonl").read_text().splitlines()[-1])
    # of a whole core: other work may have used a part of it
    steps = int(minutes * 60 * last["images_per_s"] * spent["wall"] / spent["cpu"] / 32)
    pretrained = {seed: folder / (f"pretrain-{seed}" if each_pretrained else "pretrain") for seed in seeds}
    costs, skills = [], []
    probed: dict[str, list[float]] = {"knn": [], "linear": []}
    for run_folder in dict.fromkeys(pretrained.values()):
        own_seed = {"seed": int(run_folder.name.split("-")[1])} if each_pretrained else {}
        changes = {"optim.steps": steps, "optim.warmup_steps": steps // 20, "out": str(run_folder), **own_seed}
        costs.append(round(run("pretrain", PRETRAIN, {**pretraining, **changes})["cpu"], 1))
        last = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])
        skills.append(last["skill"])
        probes = {"probes": list(probed), "controls": False, "data.labels_per_class": 500, "data.workers": 0}
        run("evaluate", str(run_folder), {**labeled, **probes, "out": str(run_folder / "evaluation")})
        best = json.loads((run_folder / "evaluation" / "result.json").read_text())["best"]["encoder"]
        for probe, accuracies_by_seed in probed.items():
            accuracies_by_seed.append(best[probe]["accuracy"])
    beside = name in (TEACHER_ROW, *(f"simmim, {encoder}" for encoder in ENCODERS))  # the other rows have the same ViT
    accuracies: dict[str, list[float]] = {"pretrained": [], "scratch": []}
    tuning_cost = 0.0
    for seed in seeds:
        run_folder = folder / f"finetune-{seed}"
        tuning = {
            **finetuning, **labeled, "encoder": str(pretrained[seed]), "seeds": [seed], "optim.steps": finetune_steps,
            "optim.warmup_steps": finetune_steps // 10, "optim.base_lr": 4e-3, "beside": ["scratch"] if beside else [],
            "out": str(run_folder),
        }  # fmt: skip
        tuning_cost += run("finetune", FINETUNE, tuning)["cpu"]
        for approach, found in json.loads((run_folder / "result.json").read_text())["score"].items():
            accuracies[approach].append(found["mean"])
    return {
        "row": name,
        "steps": steps,
        "images": 32 * steps // (VIEWS if "agreement" in pretraining else 1),
        "cpu_minutes": costs,
        "skill": skills,
        "probed": probed,
        "target_rank": next((value for key, value in last.items() if key.startswith("target_rank_")), None),
        "seeds": seeds,
        "accuracy": {approach: values for approach, values in accuracies.items() if values},
        "finetune_cpu_minutes": round(tuning_cost, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", default=list(rows()), choices=list(rows()))
    parser.add_argument("--data", type=Path, default=Path("shards/cifar10"), help="folder of the shards train and test")
    parser.add_argument("--image-size-px", type=int, default=32, help="of the rows with a ViT")
    parser.add_argument("--minutes", type=float, default=6.0, help="CPU-minutes of pretraining")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="of the fine-tuning")
    parser.add_argument("--each-pretrained", action="store_true", help="a pretraining of its own for each seed")
    parser.add_argument("--finetune-steps", type=int, default=400)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    record = given.out / "rows.jsonl"
    settings = (
        given.out, given.data, given.image_size_px, given.minutes, given.finetune_steps, given.seeds,
        given.each_pretrained,
    )  # fmt: skip
    with ThreadPoolExecutor(given.processes) as pool:
        jobs = [pool.submit(do, name, *settings) for name in given.only]
        for job in as_completed(jobs):
            line = json.dumps(job.result())
            print(line, flush=True)
            with open(record, "a") as f:
                f.write(line + "\n")


if __name__ == "__main__":
    main()
