"""Run the main job on real photographs, through the commands that a user would type.

    make demo

Crops of the photographs inside scikit-image -> shards -> pretraining without labels -> fine-tuning on a few labels,
compared with the same from scratch, three seeds each -> export -> verification -> a table. This is a demonstration: 11
photographs are no benchmark.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("runs/demo")


def run(*words: str) -> None:
    """Show a command, then run it."""
    print("\n$ " + " ".join(words), flush=True)
    program = [sys.executable, "-m", "mpp"] if words[0] == "mpp" else [sys.executable]
    command = subprocess.Popen([*program, *words[1:]], cwd=ROOT)
    while command.returncode is None:
        try:
            command.wait()
        except KeyboardInterrupt:  # the command also got it, and saves before it ends
            continue
    if command.returncode:
        print(f"ended with {command.returncode}: {' '.join(words)}", file=sys.stderr)
        sys.exit(command.returncode if command.returncode > 0 else 128 - command.returncode)


def main() -> None:
    began = time.monotonic()
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    images, shards = f"{OUT}/images", f"{OUT}/shards"
    run("python", "tools/demo_images.py", images)
    for part in ("unlabeled", "train", "val"):
        run("mpp", "pack", f"{images}/{part}", f"{shards}/{part}")
    run("mpp", "pretrain", "recipes/pretrain/demo.yaml")
    run("mpp", "finetune", "recipes/finetune/demo.yaml")
    run("mpp", "export", f"{OUT}/pretrain", f"{OUT}/encoder")
    run("mpp", "verify", f"{OUT}/encoder")
    shown = sorted(str(p.relative_to(ROOT)) for p in (ROOT / images / "val").glob("*/*-0000.png"))
    run("mpp", "reconstruct", f"{OUT}/pretrain", *shown, "--out", f"{OUT}/reconstructions.png")

    run("mpp", "inspect", f"{OUT}/pretrain", f"{images}/val")
    run("mpp", "report", f"{OUT}/pretrain", f"{OUT}/finetune", "--out", f"{OUT}/report.html")

    result = json.loads((ROOT / OUT / "finetune" / "result.json").read_text())
    spread = max(max(a["values"]) - min(a["values"]) for a in result["score"].values())
    gain = result["gain"]["mean"]
    print(f"\nThis is a demonstration: {result['val_images']} crops of 11 photographs, 5 labels for each of them.\n")
    print(f"  {'':<16}accuracy   each of {len(result['seeds'])} seeds")
    for approach, a in result["score"].items():
        print(f"  {approach:<16}{100 * a['mean']:5.1f} %    {', '.join(f'{100 * v:.1f}' for v in a['values'])}")
    print(f"  {'gain':<16}{100 * gain:+5.1f}      points; the largest spread between seeds is {100 * spread:.1f}")
    print(f"""
  encoder         {OUT}/encoder   (timm.create_model("local-dir:{OUT}/encoder", pretrained=True))
  report          {OUT}/report.html   (open it in a browser)
  reconstructions {OUT}/reconstructions.png
  metrics         {OUT}/pretrain/metrics.jsonl, {OUT}/finetune/result.json
  minutes         {(time.monotonic() - began) / 60:.1f}""")
    if gain <= spread:
        sys.exit("pretraining did not beat the same fine-tune from scratch by more than the spread of the seeds")


if __name__ == "__main__":
    main()
