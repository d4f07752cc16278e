"""The report: one page that shows what the records contain, opened in a real browser."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

import mpp
from mpp.cli.app import main
from mpp.drawing import plots
from mpp.errors import UserError
from mpp.recipe.evaluate import EvaluateRecipe
from mpp.recipe.finetune import FinetuneRecipe
from mpp.recipe.loading import check_recipe
from mpp.reporting.page import MOST_BYTES
from mpp.runs.history import read_run
from mpp.runs.records import write_json
from mpp.runs.verdict import Verdict, table
from tests.conftest import drawn_image, encoded, pretrain_recipe

SECTIONS = ["curves", "reconstructions", "finetune-fine", "probes-evaluation", "inspect", "load", "run"]
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """The tags and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def values(self, attribute: str) -> list[str]:
        return [str(a[attribute]) for _, a in self.tags if attribute in a]


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a pretraining run with its evaluation and inspection, and a fine-tuning run at two numbers of labels."""
    folder = tmp_path_factory.mktemp("report")
    val = folder / "val"
    for i in range(20):
        target = val / ("disc" if i % 2 == 0 else "square")
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{i}.png").write_bytes(encoded(drawn_image(1000 + i)))
    run = mpp.pretrain(pretrain_recipe(shards, folder / "pre", skill_every_steps=5, reconstruct_images=3)).out
    data = {"train": str(shards), "val": str(val), "image_size": 16, "workers": 0}
    tuning = {
        "job": "finetune", "out": str(folder / "fine"), "encoder": str(run), "seeds": [0, 1],
        "data": {**data, "labels_per_class": [2, 4]}, "optim": {"steps": 4, "global_batch_size": 8}, "log_every_steps": 1,
    }  # fmt: skip
    mpp.finetune(check_recipe(tuning, FinetuneRecipe))
    probing = {"job": "evaluate", "encoder": str(run), "data": data, "probes": ["knn", "linear"]}
    mpp.evaluate(recipe=check_recipe(probing, EvaluateRecipe))
    mpp.inspect(run, [str(shards)], images=16, shown=2)
    return run, folder / "fine"


@pytest.fixture(scope="module")
def page(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mpp.report(runs, tmp_path_factory.mktemp("page") / "report.html")


# ---- content


def test_what_is_on_the_page(page: Path, runs: tuple[Path, Path]) -> None:
    text = page.read_text()
    found = Page(text)
    assert page.stat().st_size < MOST_BYTES
    ids = found.values("id")
    assert len(ids) == len(set(ids)), "each id must be unique"
    assert [i for i in ids if i in SECTIONS] == SECTIONS
    assert [h.removeprefix("#") for tag, a in found.tags if tag == "a" and (h := str(a["href"]))] == SECTIONS
    words = " ".join(found.words)
    run, fine = (mpp.runs.history.read_run(r) for r in runs)
    assert f"{run.last('skill'):.4g}" in words
    assert run.data["fingerprint"] in words
    assert f"local-dir:{runs[0]}/encoder" in words
    assert "base_lr: 0.02" in words, "the recipe must be shown"
    for verdict in fine.result["verdicts"]:
        assert f"{100 * verdict['gain']['mean']:+.1f}" in words
    assert "raw pixels" in words
    assert "own statistics" in text.lower() or "borrowed" in text


def test_it_needs_nothing_but_itself(page: Path) -> None:
    text = page.read_text()
    found = Page(text)
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "iframe", "object", "base"})
    for tag, attributes in found.tags:
        for key, value in attributes.items():
            assert not key.startswith("on"), (tag, key)
            if key in ("src", "href", "xlink:href"):
                assert str(value).startswith(("data:", "#")), (tag, key, value)
    outside = re.sub(r'xmlns(:xlink)?="http://www.w3.org/[^"]*"', "", text)
    assert "http://" not in outside
    assert "https://" not in outside


def test_every_picture_has_words(page: Path) -> None:
    found = Page(page.read_text())
    labels = [a["aria-label"] for tag, a in found.tags if a.get("role") == "img"]
    assert len(labels) > 15
    assert all(label and len(label) > 20 for label in labels)
    assert all(a.get("alt") for tag, a in found.tags if tag == "img")


def test_a_run_that_is_not_finished(shards: Path, tmp_path: Path) -> None:
    run = mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **{"optim.steps": 1, "reconstruct_images": 0})).out
    shutil.rmtree(run / "encoder")
    for left_out in ("metrics.jsonl", "env.json", "data.json", "status.json"):
        (run / left_out).unlink()
        words = " ".join(Page(mpp.report([run]).read_text()).words)
        assert "What was run" in words
    assert "unknown" in words


def test_warnings_come_first(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        mpp.pretrain(pretrain_recipe(shards, tmp_path / "run", **{"optim.base_lr": 1e9}))
    found = Page(mpp.report([tmp_path / "run"]).read_text())
    assert found.values("data-kind")[0] == "failed"
    words = " ".join(found.words)
    assert words.index("Warnings") < words.index("Curves")


def test_runs_are_compared(runs: tuple[Path, Path], shards: Path, tmp_path: Path) -> None:
    other = mpp.pretrain(
        pretrain_recipe(shards, tmp_path / "other", **{"mask.ratio": 0.75, "skill_every_steps": 5, "seed": 3})
    ).out
    path = mpp.report([runs[0], other, runs[1]], tmp_path / "both.html")
    found = Page(path.read_text())
    words = " ".join(found.words)
    assert [i for i in found.values("id") if i in ("compare", "keys", "curves")] == ["compare", "keys", "curves"]
    assert re.search(r"mask\.ratio\s+0\.5|mask\.ratio\s+[\d.]+\s+0\.75", words)
    assert "data.shards" not in words.split("Recipe keys that differ")[1].split("Curves")[0], (
        "keys with equal values must not be listed"
    )
    for axis in ("step", "images", "hours"):
        assert f"Loss over {axis}" in path.read_text()
    assert "gain over scratch, 4 labels a class" in words, "the gain must be shown for the run that the encoder is from"


def test_a_probe_that_does_better_than_the_fine_tune(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """The note appears if both results are of one encoder and the same labels, and the gap exceeds the interval."""
    run, fine = runs

    def says(mean: float, half_width: float | None = None, **changes: Any) -> bool:
        folder = Path(shutil.copytree(fine, tmp_path / f"fine{len(list(tmp_path.iterdir()))}"))
        recipe = yaml.safe_load((fine / "recipe.yaml").read_text())
        recipe["data"] |= {"labels_per_class": None} | {k: v for k, v in changes.items() if k in recipe["data"]}
        recipe |= {k: v for k, v in changes.items() if k in recipe}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        result = json.loads((fine / "result.json").read_text())
        verdict = result["verdicts"][0]
        verdict["score"]["pretrained"] |= {"mean": mean, "half_width": half_width}
        (folder / "result.json").write_text(json.dumps({**result, "verdicts": [verdict]}))
        page = mpp.report([run, folder], tmp_path / "page.html").read_text()
        return "probe of the frozen encoder does better" in " ".join(Page(page).words)

    best = max(found["accuracy"] for found in read_run(run / "evaluation").result["best"]["encoder"].values())
    assert says(best - 0.1, 0.05)
    assert not says(best - 0.1), "one seed must not be enough"
    assert not says(best - 0.1, 0.15), "the gap is within the interval"
    assert not says(best, 0.0)
    assert not says(best - 0.1, 0.0, frozen=1.0), "with a frozen encoder, fine-tuning is a probe itself"
    assert not says(best - 0.1, 0.0, val=["elsewhere"])
    assert not says(best - 0.1, 0.0, labels_per_class=[4])
    assert not says(best - 0.1, 0.0, encoder="elsewhere")


# ---- records written by the tests, and hostile ones


def written(folder: Path, recipe: dict[str, Any], scores: dict[str, list[float]]) -> Path:
    """Write the records of a fine-tuning run that found these accuracies over its seeds."""
    verdict = Verdict.of(None, {approach: [{"accuracy": v} for v in values] for approach, values in scores.items()})
    folder.mkdir()
    recipe = {"job": "finetune", "out": str(folder), "seeds": list(range(len(next(iter(scores.values()))))), **recipe}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_json(folder / "result.json", {"metric": "accuracy", "verdicts": [dataclasses.asdict(verdict)]})
    write_json(folder / "status.json", {"state": "finished"})
    return folder


@pytest.mark.parametrize(
    ("scratch", "words"),
    [
        ([0.2], "one seed, so no interval and no conclusion"),
        ([0.205, 0.25], "a gain is not shown with 2 seeds"),
        ([0.1, 0.11], "pretraining helped"),
        ([0.5, 0.51], "pretraining hurt"),
    ],
)
def test_it_concludes_as_the_terminal_does(
    scratch: list[float], words: str, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    """A gain of 0.5 points from one seed must not count as a gain."""
    scores = {"pretrained": [0.205, 0.215][: len(scratch)], "scratch": scratch}
    fine = written(tmp_path / "fine", {"encoder": str(runs[0])}, scores)
    page = " ".join(Page(mpp.report([runs[0], fine], tmp_path / "r.html").read_text()).words)
    terminal = table(
        [Verdict.of(None, {approach: [{"accuracy": v} for v in values] for approach, values in scores.items()})]
    )
    assert words in terminal
    assert page.lower().count(words) >= 2, "expected in the first sentence and next to the table"
    assert "did not help" not in page
    for other in {"pretraining helped", "pretraining hurt", "is not shown with", "no conclusion"} - {words}:
        assert other not in page.lower() or other in words


def test_runs_with_one_approach_are_called_what_they_are(runs: tuple[Path, Path], tmp_path: Path) -> None:
    alone = written(tmp_path / "alone", {"encoder": str(runs[0]), "beside": []}, {"pretrained": [0.3, 0.4]})
    scratch = written(tmp_path / "scratch", {"encoder": "scratch"}, {"scratch": [0.3]})
    other = written(
        tmp_path / "other", {"encoder": "vit_small_patch16_224.dino"}, {"pretrained": [0.3], "scratch": [0.2]}
    )
    pages = [
        " ".join(Page(mpp.report([runs[0], run], tmp_path / "r.html").read_text()).words)
        for run in (alone, scratch, other)
    ]
    assert "Trained: the pretrained encoder alone; task classify, seeds 0, 1; intervals" in pages[0]
    assert "Trained: the encoder from scratch alone; task classify, seed 0." in pages[1]
    assert (
        "Trained on the same labels: the pretrained encoder, the encoder from scratch; task classify, seed 0."
        in pages[2]
    )
    assert "Not this run's encoder, but vit_small_patch16_224.dino." in pages[2]
    assert all("Not this run's encoder" not in page for page in pages[:2])
    assert all(">gain<" not in mpp.report([run], tmp_path / "r.html").read_text() for run in (alone, scratch))


def test_hostile_words_stay_words(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / HOSTILE.replace("/", "∕")
    shutil.copytree(runs[0], run)
    for name in ("recipe.yaml", "status.json"):
        path = run / name
        path.write_text(path.read_text().replace("uniform", HOSTILE).replace("finished", HOSTILE))
    index = run / "inspect" / "index.json"
    index.write_text(index.read_text().replace("Position embeddings", HOSTILE))
    drawing = run / "inspect" / "positions.svg"
    drawing.write_text(drawing.read_text().replace("</svg>", "<script>alert(3)</script></svg>"))
    text = mpp.report([run], tmp_path / "page.html").read_text()
    found = Page(text)
    assert not {"script", "object"} & {tag for tag, _ in found.tags}
    assert not [a for _, a in found.tags if any(key.startswith("on") for key in a)]
    assert "&lt;script&gt;alert(1)" in text
    assert "alert(3)" not in text, "a changed drawing must be replaced by the picture of pixels"


@pytest.mark.parametrize(
    "inside",
    [
        '<a href="http://x"><rect/></a>', '<image href="http://x/y.png"/>', '<rect onload="x"/>', "<style>*{}</style>",
        '<rect style="fill:url(http://x)"/>', "<foreignObject/>", '<use href="other.svg#a"/>', "<!-- x --><rect/>", "<g>",
    ],
)  # fmt: skip
def test_a_drawing_that_is_more_than_a_drawing(inside: str) -> None:
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1">{}</svg>'
    assert plots.is_own_svg(svg.format("<rect/>"))
    assert not plots.is_own_svg(svg.format(inside))


@pytest.mark.slow
def test_a_page_is_never_too_large(
    runs: tuple[Path, Path], page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    noise = Image.effect_noise((900, 900), 90).convert("RGB")
    noise.save(run / "inspect" / "positions.png")
    (run / "inspect" / "positions.svg").unlink()
    whole = mpp.report([run], tmp_path / "whole.html").stat().st_size
    monkeypatch.setattr("mpp.reporting.page.MOST_BYTES", whole - 200_000)
    assert mpp.report([run], tmp_path / "less.html").stat().st_size <= whole - 200_000
    monkeypatch.setattr("mpp.reporting.page.MOST_BYTES", 10_000)
    with pytest.raises(UserError, match="MB; expected at most"):
        mpp.report([run], tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/none"], "/none: no such file or folder"),
        (["{trial}"], "is one model of the fine-tune"),
        (["{run}", "--out", "{file}/x.html"], "/file/x.html: "),
        (["{broken}"], "recipe.yaml: not the recipe of a run"),
    ],
)
def test_errors(words: list[str], message: str, runs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "recipe.yaml").write_text("[")
    trial = next(runs[1].glob("*seed0"))
    names = {"run": runs[0], "trial": trial, "file": tmp_path / "file", "broken": tmp_path / "broken"}
    done = CliRunner().invoke(main, ["report", *(w.format(**names) for w in words)])
    assert done.exit_code == 2, done.output
    assert message in done.output


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return the system's Chromium, headless."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=program, args=[*quiet, "--disable-component-update", "--disable-quic"]
        )
        yield started
        started.close()


def opened(browser: Any, path: Path, *, width: int = 1200, scheme: str = "light") -> tuple[Any, list[str]]:
    """Return the page, and everything that it reported or requested."""
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    heard: list[str] = []
    tab.on("console", lambda message: heard.append(message.text))
    tab.on("pageerror", lambda error: heard.append(str(error)))
    tab.on("dialog", lambda dialog: (heard.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda request: request.url.startswith("data:") or heard.append(request.url))
    tab.goto(path.absolute().as_uri())
    tab.wait_for_load_state("load")
    heard.remove(path.absolute().as_uri())
    return tab, heard


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (390, "light"), (390, "dark")])
def test_it_opens(browser: Any, page: Path, width: int, scheme: str) -> None:
    tab, heard = opened(browser, page, width=width, scheme=scheme)
    assert heard == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "nothing may be wider than the page"
    assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    boxes = tab.evaluate("[...document.querySelectorAll('figure svg, figure img')].map(e => e.getBoundingClientRect())")
    assert len(boxes) > 15
    assert all(b["width"] > 100 and b["height"] > 40 for b in boxes)
    colours = tab.evaluate(
        """() => { const of = e => getComputedStyle(e);
        return [of(document.body).backgroundColor, of(document.querySelector('h1')).color,
                of(document.querySelector('figure svg text')).fill]; }"""
    )
    ground, *inks = (luminance(c) for c in colours)
    assert (ground > 0.8) == (scheme == "light")
    for ink in inks:  # WCAG 2.1, 1.4.3
        assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) > 7, "text and plots must contrast with the page"
    tab.close()


def luminance(colour: str) -> float:
    channels = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_sections_are_reached_by_their_links(browser: Any, page: Path) -> None:
    tab, heard = opened(browser, page)
    for name in SECTIONS:
        tab.click(f'nav a[href="#{name}"]')
        assert -5 <= tab.evaluate(f"document.getElementById('{name}').getBoundingClientRect().top") < 900
    tab.click("summary >> nth=-1")
    assert heard == []
    tab.close()


def test_plots_keep_their_marks_apart(browser: Any, page: Path) -> None:
    """Clip paths of one plot must not apply to another: every curve is as wide as its axes."""
    tab, _ = opened(browser, page)
    wide = tab.evaluate(
        """() => [...document.querySelectorAll('#curves ~ .pictures svg')].map(s => {
             const lines = [...s.querySelectorAll('g[id*="line2d"] path[clip-path]')].filter(
               p => getComputedStyle(p).stroke === 'rgb(47, 129, 247)');
             return lines.length ? lines[0].getBoundingClientRect().width / s.getBoundingClientRect().width : 0; })"""
    )
    assert len(wide) >= 5
    assert all(0.3 < w < 1 for w in wide), wide
    tab.close()


def test_hostile_words_do_nothing_in_a_browser(browser: Any, runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / HOSTILE.replace("/", "∕")
    shutil.copytree(runs[0], run)
    path = run / "recipe.yaml"
    path.write_text(path.read_text().replace("uniform", HOSTILE))
    tab, heard = opened(browser, mpp.report([run], tmp_path / "page.html"))
    assert heard == []
    assert "alert(1)" in tab.inner_text("h1")
    tab.close()
