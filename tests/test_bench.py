"""The benchmarks: turns, tables, and that the published page is what was measured."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

TINY = {"size": "tiny", "decoder": "small", "precision": "fp32"}


def module(name: str) -> Any:
    """Import a module of tools/bench, whose files import each other as scripts do."""
    folder = str(ROOT / "tools" / "bench")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def turns() -> Any:
    """Return two contestants that have taken turns, each in its own process."""
    timing = module("timing")
    names = ("mpp late, 1 block, a third", "mpp SimMIM")
    contestants = [timing.Contestant(name, sys.executable, "ours", "STEP", TINY) for name in names]
    timing.interleave(contestants, rounds=3, turn_s=0.05)
    yield contestants
    for c in contestants:
        c.end()


@pytest.mark.slow
def test_contestants_take_turns_of_about_the_same_length(turns: Any) -> None:
    timing = module("timing")
    late, simmim = turns
    assert [len(c.turns) for c in turns] == [3, 3]
    for c in turns:
        assert all(t.images == 4 * c.units and t.wall_s > 0 and t.cpu_s > 0 for t in c.turns)
        assert c.turns[-1].peak_mib >= c.facts["built_mib"] > 100
    assert late.facts["gflop_per_image"] < 0.5 * simmim.facts["gflop_per_image"]
    pairs = [(a.images / a.wall_s) / (b.images / b.wall_s) for a, b in zip(late.turns, simmim.turns, strict=True)]
    assert timing.ratio(late, simmim).median == pytest.approx(sorted(pairs)[1])


@pytest.mark.slow
def test_a_contestant_that_does_not_come_up_says_why() -> None:
    timing = module("timing")
    with pytest.raises(timing.Failed, match="nobody: KeyError: 'nobody'"):
        timing.Contestant("nobody", sys.executable, "ours", "STEP", TINY)


@pytest.mark.parametrize("name", list(module("ours").OBJECTIVES))
def test_every_objective_of_ours_runs(name: str) -> None:
    contestant = module("ours").STEP[name]("tiny", "small", "fp32")
    assert contestant.run(2) == 8
    assert contestant.facts["gflop_per_image"] > 0


def test_quartiles() -> None:
    spread = module("timing").Spread
    assert spread.of([3.0, 1.0, 2.0, 5.0, 4.0]) == (3.0, 2.0, 4.0)
    assert spread.of([7.0]) == (7.0, 7.0, 7.0)


def rows(bench: Any) -> list[Any]:
    made = []
    for name, rate in ((bench.OURS, 200.0), ("transformers MAE", 100.0), ("lightly MAE", 80.0), ("a SimMIM", 50.0)):
        for metric, value in (
            ("images_per_s", rate), ("images_per_s_q1", rate - 1), ("images_per_s_q3", rate + 1),
            ("mpp_is_times_as_fast", 200.0 / rate), ("gflop_per_image", 1.5), ("part_of_gemm_peak", 0.75),
        ):  # fmt: skip
            made.append(bench.Row("bench-step-32px-small-fp32", name, metric, value))
    made.append(bench.Row("bench-step-32px-small-fp32", "GEMM", "gflop_per_s", 180.0))
    for name, rate in (("mpp", 900.0), ("lightly", 300.0)):
        for metric, value in (
            ("images_per_core_s", rate), ("images_per_core_s_q1", rate), ("images_per_core_s_q3", rate),
            ("mpp_is_times_as_fast", 900.0 / rate),
        ):  # fmt: skip
            made.append(bench.Row("bench-input-375x500", name, metric, value))
    made.append(bench.Row("bench-memory-32px-small-fp32", "lightly MAE", "peak_mib", 1307.0))
    for metric in ("first_step_s", "images_per_s", "peak_mib"):
        made.append(bench.Row("bench-whole-vit_s", "mpp", metric, 7.0))
    return made


def test_tables_name_the_fastest_peer_of_each_kind(tmp_path: Path) -> None:
    bench = module("bench")
    summary = bench.summary(rows(bench)).splitlines()
    assert "| 32px, small, fp32 | 200 images/s | 2.00 × (transformers MAE) | 4.00 × (a SimMIM) |  |" in summary
    assert "| JPEGs of 375x500 | 900 images a core-second | 3.00 × (lightly) |" in summary
    assert "| mpp | 7.0 | 7 | 7 |" in summary
    page = bench.tables(rows(bench))
    assert "| lightly MAE | 80 (79 – 81) | 2.50 | 1.5 | 0.75 |" in page
    assert "GEMM 180 GFLOP/s" in page
    assert "| lightly MAE | 1307 |" in page
    bench.plot(rows(bench), tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_rows_are_replaced_and_others_stay(tmp_path: Path) -> None:
    bench = module("bench")
    results = tmp_path / "r.csv"
    shutil.copy(bench.RESULTS, results)
    before = [line for line in results.read_text().splitlines() if ",bench," not in line]
    bench.written(rows(bench), results)
    bench.written(rows(bench), results)
    assert [line for line in results.read_text().splitlines() if ",bench," not in line] == before
    found = [r for r in bench.read(results) if r.run == "bench-whole-vit_s"]
    assert [r.value for r in found] == [7.0] * 3


def test_what_is_published_is_what_was_written() -> None:
    """`make bench` measures and writes everything at once."""
    bench = module("bench")
    measured = bench.read(bench.RESULTS)
    assert {r.run.split("-")[1] for r in measured} == {"step", "memory", "input", "whole", "keep", "embed", "growth"}
    text = bench.PAGE.read_text()
    assert bench.put_between_marks(text, bench.page(measured)) == text
    with pytest.raises(ValueError, match="is missing"):
        bench.put_between_marks("nothing", "x")


def test_pictures_have_their_size_and_are_not_blank() -> None:
    pictures, numpy = module("pictures"), pytest.importorskip("numpy")
    from PIL import Image
    from skimage import data

    made = pictures.picture(Image.fromarray(data.astronaut()), 50, 40, numpy.random.default_rng(0))
    assert made.size == (50, 40)
    assert numpy.asarray(made).std() > 10


def test_growth_of_order_and_index() -> None:
    growth = module("growth")
    assert growth.order(100)["resume_s"] < 1
    found = growth.order(10**9)
    assert found["resume_s"] < 5
    assert found["held_mib"] < 100
    assert growth.index(500)["index_s"] < 5


@pytest.mark.slow
def test_ours_is_saved_resumed_and_exported(tmp_path: Path) -> None:
    for name, made in module("ours").KEEP.items():
        assert made(size="tiny", folder=str(tmp_path / name)).run(2) == 2
    assert (tmp_path / "mpp: export" / "mpp" / "encoder" / "config.json").exists()


@pytest.mark.slow
def test_a_whole_command_is_timed(shards: Path, tmp_path: Path) -> None:
    whole = module("whole")
    (tmp_path / "x-shards").symlink_to(shards)
    tiny = {
        "data.image_size": 16, "encoder.args": "{patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}",
        "corruption.enter": 1, "optim.global_batch_size": 8,
    }  # fmt: skip
    command = whole.ours(str(tmp_path / "x"), 0, **tiny)
    found = whole.run(command, steps=3, batch=8, out=tmp_path / "run")
    assert found.first_step_s > 0.5
    assert found.images_per_s > 1
    assert found.peak_mib > 100
    wrong = whole.ours(str(tmp_path / "x"), 0, **{**tiny, "data.image_size": 15})
    with pytest.raises(module("timing").Failed, match=r"data\.image_size"):
        whole.run(wrong, steps=3, batch=8, out=tmp_path / "other")


@pytest.mark.exhaustive
def test_the_command_for_gpus_runs_at_a_tiny_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = module("gpu")
    monkeypatch.setattr(gpu, "CONTESTANTS", (gpu.OURS, "lightly MAE"))
    monkeypatch.setattr(gpu, "TURN_S", 0.05)
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--sizes", "tiny", "--peers", "no-such-python"])
    out, said = capsys.readouterr()
    assert f"| tiny | {gpu.OURS} | 4 | " in out
    assert out.count("\n| mpp | ") == 1
    assert ended.value.code == 1, "expected 1 if a peer does not start"
    assert "missing: tiny: lightly MAE" in said
    with pytest.raises(SystemExit):
        gpu.main(["--sizes", "tiny", "--minutes", "0"])
    assert f"missing: tiny: {gpu.OURS}: no time was left" in capsys.readouterr().err


def test_peaks_of_devices() -> None:
    """The first part that is in the device's name counts: PCIe cards are slower than others of their kind."""
    peaks = module("gpu").PEAK_TFLOPS
    found = [
        next(v for part, v in peaks.items() if part in name) for name in ("NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3")
    ]
    assert found == [756.0, 989.4]
