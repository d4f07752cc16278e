"""`mpp pack`: write images as shards in WebDataset's format, with their indexes.

Sources (`sources.py`) are a folder, a CSV file, Parquet files or tar shards. Each source has a fixed number of samples
and can read any range of them. So any process, on this or another machine, can write any shard independently.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image, UnidentifiedImageError

from mpp.data.decoding.arrays import NPY, TIFF, check_npy, split_tiff
from mpp.data.decoding.decode import own_pixel_limit
from mpp.data.decoding.dicom import DicomFile, is_dicom
from mpp.data.shards.index import index_shard, packed_name
from mpp.data.shards.listing import write_listing
from mpp.data.shards.sources import Source, open_source
from mpp.errors import BadImage, UserError, one_line
from mpp.parallel.children import end_with
from mpp.recipe.sections import DECODING
from mpp.recipe.values import IMAGE

DESCRIPTION = "dataset.json"
SKIPPED = "skipped.tsv"
SOURCES = "sources.tsv"


@dataclass(frozen=True)
class Packed:
    """Result of `pack`."""

    shards: int
    shards_written: int
    """Shards that this call wrote: fewer than `shards` if earlier calls or other parts wrote some."""
    shards_missing: int
    """Shards that other parts still have to write."""
    images: int
    """Images in the shards that exist now."""
    labeled: bool
    classes: list[str]
    """Names of the classes. Empty for unlabeled data, and for labels that are numbers without names."""
    skipped: list[tuple[str, str]]
    """(place in the source, reason) of everything that was left out."""


def pack(
    source: str,
    out: str,
    *,
    images_per_shard: int = 1000,
    labels: bool | None = None,
    seed: int = 0,
    workers: int = 2,
    part: tuple[int, int] = (1, 1),
    image_extension: str | None = None,
    split_pages: bool = False,
    on_shard: Callable[[int, int], None] | None = None,
) -> Packed:
    """Write the images of `source` as shards into `out`. Separate files are shuffled by `seed`.

    After an interruption, the same call continues where it stopped. The bytes of the images are copied unchanged, but
    of DICOM files only the frames are kept, each as an .npy file.

    Args:
        labels: Whether to pack the label of each image. In a folder, it is the name of the first folder below `source`.
            None means to pack labels if every image has one.
        part: (i, n) for the i-th of n calls, on up to n machines. They share `out`, or their outputs are put into one
            folder. The call that finds all shards in `out` completes the folder.
        image_extension: Extension of the member that is a sample's image in tar shards, see `samples_among`.
        split_pages: Whether each page of a TIFF becomes an image, as an .npy file. Otherwise pages are channels.
        on_shard: Function called with (shards done, shards of this part) after each shard.

    Raises:
        UserError: If there are no images, or `out` holds something else.
    """
    if os.path.isdir(source) and Path(out).resolve().is_relative_to(Path(source).resolve()):
        raise UserError(f"{out}: is inside {source}; choose another folder")
    opened = open_source(source, labels=labels, seed=seed, image_extension=image_extension)
    shards = -(-opened.samples // images_per_shard)
    if not 1 <= part[0] <= part[1]:
        raise UserError(f"--part: expected I/N with I from 1 to N, for example 1/3; got {part[0]}/{part[1]}")
    description = {
        "format": 1,
        "images_listed": opened.samples,
        "images_per_shard": images_per_shard,
        "seed": seed,
        "classes": opened.classes,
        "files_sha256": hashlib.sha256(opened.identity).hexdigest(),
        "split_pages": split_pages,
    }
    _claim(Path(out), description)
    paths = [os.path.join(out, packed_name(k)) for k in range(shards)]
    jobs = [
        (opened, path, k * images_per_shard, min((k + 1) * images_per_shard, opened.samples), split_pages)
        for k, path in enumerate(paths)
        if k % part[1] == part[0] - 1
    ]
    pending = [job for job in jobs if not os.path.exists(job[1])]
    try:
        for done, _ in enumerate(_write_shards(pending, workers), len(jobs) - len(pending) + 1):
            if on_shard:
                on_shard(done, len(jobs))
    except BrokenProcessPool as error:
        raise UserError("a packing process died (out of memory?); run the same command again to continue") from error
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror}; run the same command again to continue") from error

    there = [path for path in paths if os.path.exists(path)]
    indexes = {os.path.basename(path): index_shard(path, out) for path in there}
    images = sum(len(index.table) for index in indexes.values())
    skipped = list(opened.skipped)
    for path in there:
        skipped += [tuple(line.split("\t", 1)) for line in _lines(f"{path}.skipped")]  # type: ignore[misc]
    missing = len(paths) - len(there)
    if not missing:
        sources = [line for path in paths for line in _lines(f"{path}.sources")]
        _write_text(os.path.join(out, SOURCES), "".join(f"{line}\n" for line in sources))
        _write_text(os.path.join(out, SKIPPED), "".join(f"{where}\t{why}\n" for where, why in skipped))
        if images == 0:
            raise UserError(f"{source}: none of {opened.samples} could be read as an image; see {out}/{SKIPPED}")
        write_listing(out, indexes)
        _write_text(os.path.join(out, DESCRIPTION), json.dumps({**description, "images": images}, indent=1))
    return Packed(len(paths), len(pending), missing, images, opened.labeled, opened.classes, sorted(skipped))


Job = tuple[Source, str, int, int, bool]
"""(source, path of a shard, number of its first file, number after its last file, whether to split pages)."""


def _write_shards(pending: list[Job], workers: int) -> Iterator[None]:
    """Write shards, in several processes if `workers` is above 1, and yield after each."""
    if workers <= 1 or len(pending) <= 1:
        for job in pending:
            _write_shard(*job)
            yield
        return
    with ProcessPoolExecutor(min(workers, len(pending)), initializer=end_with, initargs=(os.getpid(),)) as pool:
        for future in as_completed([pool.submit(_write_shard, *job) for job in pending]):
            future.result()
            yield


def _claim(out: Path, description: dict[str, object]) -> None:
    """Use a new or empty folder, or one that the same call began. Raise UserError for any other."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / DESCRIPTION).exists():
            # files that begin with this name are those that another part is writing at this moment
            if stray := next((p for p in out.iterdir() if not p.name.startswith(DESCRIPTION)), None):
                raise UserError(f"{out}: not empty (holds {stray.name}); give a new folder")
            _write_text(str(out / DESCRIPTION), json.dumps(description, indent=1))
            return
        before = json.loads((out / DESCRIPTION).read_text())
    except FileExistsError as error:
        raise UserError(f"{out}: is a file; give a new folder") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: {getattr(error, 'strerror', None) or error}") from error
    before.setdefault("split_pages", False)  # older folders do not say it
    changed = [k for k, v in description.items() if before.get(k) != v]
    if changed:
        raise UserError(f"{out}: holds shards packed with other settings ({', '.join(changed)}); choose a new folder")


def extension_of(data: bytes) -> str:
    """Return the extension that fits the content of an image file.

    Raises:
        BadImage: If the content is not an image that mpp reads, with the reason.
    """
    if data.startswith(NPY):
        check_npy(data)
        return "npy"
    try:
        with own_pixel_limit(), Image.open(io.BytesIO(data)) as image:
            extension = (image.format or "").lower().replace("jpeg", "jpg").replace("mpo", "jpg")  # cameras' JPEGs
    except UnidentifiedImageError as error:
        if data.startswith(TIFF):  # with many channels or more than 8 bits
            return "tiff"
        raise BadImage("not an image by its content") from error
    except Exception as error:  # Pillow's readers raise anything on damaged files
        raise BadImage(str(getattr(error, "strerror", None) or error)) from error
    if not IMAGE.search(f"x.{extension}"):
        raise BadImage(f"format {extension} is not read")
    return extension


def images_in(data: bytes, *, split_pages: bool) -> Iterator[tuple[str, bytes] | BadImage]:
    """Yield (extension, bytes) of each image in a file, or why one of them cannot be read.

    Most files are one image and stay as they are. DICOM files hold data of patients, so only their pixels are kept.

    Args:
        data: Bytes of the file.
        split_pages: Whether each page of a TIFF is an image.

    Raises:
        BadImage: If the file has no image that mpp reads.
        UserError: If a package for reading such files is not installed.
    """
    if is_dicom(data):
        file = DicomFile(data)
        for frame in range(file.frames):
            try:
                yield "npy", _as_npy(file.read(frame, max_image_pixels=DECODING["max_image_pixels"]))
            except BadImage as error:
                yield error
        return
    pages = split_tiff(data) if split_pages and data.startswith(TIFF) else iter(())
    first = next(pages, None)
    if first is None:
        yield extension_of(data), data
        return
    for page in itertools.chain([first], pages):
        yield page if isinstance(page, BadImage) else ("npy", _as_npy(page))


def _as_npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _write_shard(source: Source, shard: str, first: int, end: int, split_pages: bool) -> None:
    """Write one shard, under a temporary name until it is complete and on the disk."""
    part = f"{shard}.part"
    sources, skipped = [], []
    with open(part, "wb") as f:
        with webdataset.TarWriter(
            f, mtime=0
        ) as writer:  # fixed, so that the same images give the same bytes; an int, because a float needs pax headers
            for number, (where, data, label) in enumerate(source.read(first, end), first):
                try:
                    if isinstance(data, str):
                        raise BadImage(data)
                    for page, image in enumerate(images_in(data, split_pages=split_pages)):
                        if isinstance(image, BadImage):
                            skipped.append(f"{where}, image {page + 1}\t{one_line(image)}")
                            continue
                        key = f"{number:09d}" if page == 0 else f"{number:09d}_{page:04d}"
                        sample: dict[str, object] = {"__key__": key, image[0]: image[1]}
                        if label is not None:
                            sample["cls"] = label
                        writer.write(sample)
                        sources.append(f"{os.path.basename(shard)}\t{key}.{image[0]}\t{where}")
                except BadImage as error:
                    skipped.append(f"{where}\t{one_line(error)}")
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
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"  # parts may finish at the same time
    try:
        Path(temporary).write_text(text, encoding="utf-8", errors="surrogateescape")
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, path) from error
