"""`mpp pack`: a folder of images -> shards in WebDataset's format, with their indexes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import webdataset
from PIL import Image, UnidentifiedImageError

from mpp.data.children import end_with
from mpp.data.index import IMAGE, cannot_list, index_shard
from mpp.errors import UserError
from mpp.rng import Purpose, stream

DESCRIPTION = "dataset.json"
SKIPPED = "skipped.tsv"
SOURCES = "sources.tsv"


@dataclass(frozen=True)
class Packed:
    """What `pack` returns."""

    shards: int
    shards_written: int
    """Fewer than `shards` where an earlier, interrupted call had written some."""
    images: int
    classes: list[str]
    """Empty for unlabeled data."""
    skipped: list[tuple[str, str]]
    """(path below the source, why) of every file that was left out."""


def pack(
    source: str,
    out: str,
    *,
    images_per_shard: int = 1000,
    labels: bool | None = None,
    seed: int = 0,
    workers: int = 2,
    on_shard: Callable[[int, int], None] | None = None,
) -> Packed:
    """Write the images below `source` as shards into `out`, in an order shuffled by `seed`.

    labels: the first folder below `source` is an image's class; None: if every image lies in one.
    The images' bytes are copied as they are. Interrupted, the same call goes on where it stopped.
    on_shard(done, of) is called as shards are finished.
    UserError where there are no images, or `out` holds something else.
    """
    if not os.path.isdir(source):
        raise UserError(f"{source}: no such folder")
    files, skipped = _list(source)
    if not files:
        raise UserError(f"{source}: no images found (by name: .jpg .jpeg .png .webp .bmp .tif .tiff .gif)")
    in_folders = all("/" in f for f in files)
    if labels and not in_folders:
        stray = next(f for f in files if "/" not in f)
        raise UserError(f"{source}: labels are the first folder's name, but {stray} lies in none")
    labeled = in_folders if labels is None else labels
    classes = sorted({f.split("/", 1)[0] for f in files}) if labeled else []
    order = stream(seed, Purpose.PACK).permutation(len(files))
    shards = -(-len(files) // images_per_shard)
    description = {
        "format": 1,
        "images_listed": len(files),
        "images_per_shard": images_per_shard,
        "seed": seed,
        "classes": classes,
        "files_sha256": hashlib.sha256("\0".join(files).encode("utf-8", "surrogateescape")).hexdigest(),
    }
    _claim(Path(out), description)

    jobs = []
    for k in range(shards):
        numbers = order[k * images_per_shard : (k + 1) * images_per_shard]
        entries = [
            (
                f"{k * images_per_shard + i:09d}",
                files[n],
                classes.index(files[n].split("/", 1)[0]) if labeled else -1,
            )
            for i, n in enumerate(numbers.tolist())
        ]
        jobs.append((source, os.path.join(out, f"shard-{k:06d}.tar"), entries))
    pending = [job for job in jobs if not os.path.exists(job[1])]
    try:
        if workers <= 1 or len(pending) <= 1:
            for done, job in enumerate(pending, 1):
                _write_shard(*job)
                if on_shard:
                    on_shard(shards - len(pending) + done, shards)
        else:
            with ProcessPoolExecutor(min(workers, len(pending)), initializer=end_with, initargs=(os.getpid(),)) as pool:
                futures = [pool.submit(_write_shard, *job) for job in pending]
                for done, future in enumerate(as_completed(futures), 1):
                    future.result()
                    if on_shard:
                        on_shard(shards - len(pending) + done, shards)
    except BrokenProcessPool as error:
        raise UserError("a packing process died (out of memory?); run the same command again to go on") from error
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror}; run the same command again to go on") from error

    images = 0
    for _, shard, _ in jobs:
        images += len(index_shard(shard, out).table)
        skipped += [tuple(line.split("\t")) for line in _lines(f"{shard}.skipped")]  # type: ignore[misc]
    for name, suffix in ((SOURCES, ".sources"), (SKIPPED, ".skipped")):
        lines = [line for _, shard, _ in jobs for line in _lines(shard + suffix)]
        if name == SKIPPED:
            lines = [f"{path}\t{why}" for path, why in skipped]
        _write_text(os.path.join(out, name), "".join(f"{line}\n" for line in lines))
    if images == 0:
        raise UserError(f"{source}: none of {len(files)} files could be read as an image; see {out}/{SKIPPED}")
    _write_text(os.path.join(out, DESCRIPTION), json.dumps({**description, "images": images}, indent=1))
    return Packed(shards, len(pending), images, classes, sorted(skipped))


def _list(source: str) -> tuple[list[str], list[tuple[str, str]]]:
    """(files with an image's name, the others), as paths below `source` with /, sorted. Links are followed once.

    UserError for a folder that may not be read: its images would be missing in silence.
    """
    files, skipped, seen = [], [], set()
    for folder, subfolders, names in os.walk(source, followlinks=True, onerror=cannot_list):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up
            subfolders.clear()
            continue
        seen.add(real)
        hidden = [name for name in subfolders if name.startswith(".")]
        subfolders[:] = sorted(set(subfolders) - set(hidden))
        for name in sorted(names + hidden):
            path = os.path.relpath(os.path.join(folder, name), source).replace(os.sep, "/")
            if name.startswith("."):  # .ipynb_checkpoints/, .thumbnails/, ._photo.jpg
                skipped.append((path, "hidden"))
            elif "\t" in path or "\n" in path:
                skipped.append((repr(path), "tab or newline in the name"))
            elif not IMAGE.search(name):
                skipped.append((path, "not an image by its name"))
            elif not os.path.isfile(os.path.join(folder, name)):  # a pipe would be waited for
                skipped.append((path, "not a file"))
            else:
                files.append(path)
    return sorted(files), skipped


def _claim(out: Path, description: dict[str, object]) -> None:
    """Take an empty or new folder, or one that the same call began."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / DESCRIPTION).exists():
            if stray := next(out.iterdir(), None):
                raise UserError(f"{out}: not empty (holds {stray.name}); give a new folder")
            _write_text(str(out / DESCRIPTION), json.dumps(description, indent=1))
            return
        before = json.loads((out / DESCRIPTION).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: {getattr(error, 'strerror', None) or error}") from error
    changed = [k for k, v in description.items() if before.get(k) != v]
    if changed:
        raise UserError(f"{out}: holds shards of another call ({', '.join(changed)} differ); give a new folder")


def _write_shard(source: str, shard: str, entries: list[tuple[str, str, int]]) -> None:
    """One shard, under a temporary name until it is whole and on the disk."""
    part = f"{shard}.part"
    sources, skipped = [], []
    with open(part, "wb") as f:
        with webdataset.TarWriter(
            f, mtime=0
        ) as writer:  # an int, a float would need pax headers; fixed: the same images give the same bytes
            for key, path, label in entries:
                full = os.path.join(source, path)
                try:
                    with Image.open(full) as image:
                        extension = (image.format or "").lower().replace("jpeg", "jpg")
                    data = Path(full).read_bytes()
                except UnidentifiedImageError:
                    skipped.append(f"{path}\tnot an image by its content")
                    continue
                except (OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
                    skipped.append(f"{path}\t{getattr(error, 'strerror', None) or error}")
                    continue
                name = f"{key}.{extension}"
                if not IMAGE.search(name):
                    skipped.append(f"{path}\tformat {extension} is not read")
                    continue
                sample: dict[str, object] = {"__key__": key, extension: data}
                if label >= 0:
                    sample["cls"] = label
                writer.write(sample)
                sources.append(f"{os.path.basename(shard)}\t{name}\t{path}")
        f.flush()
        os.fsync(f.fileno())
    _write_text(f"{shard}.sources", "".join(f"{s}\n" for s in sources))
    _write_text(f"{shard}.skipped", "".join(f"{s}\n" for s in skipped))
    os.replace(part, shard)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="surrogateescape").split("\n")[:-1]
    except FileNotFoundError:
        return []


def _write_text(path: str, text: str) -> None:
    temporary = f"{path}.tmp"
    Path(temporary).write_text(text, encoding="utf-8", errors="surrogateescape")
    os.replace(temporary, path)
