"""Write vectors of images in parts, and join the parts into one .npy or Parquet file.

vectors.npy.parts/  embedding.json   what the vectors are of
                    part-00000/ …    vectors of some images, and the images that could not be read
vectors.npy         one row for each image
vectors.names.txt   the names of the images, a line for each row; Parquet files hold the names themselves
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpp.data.shards.sources import import_parquet
from mpp.errors import UserError
from mpp.recipe.flat import JsonObject
from mpp.runs.records import write_json

SUFFIXES = (".npy", ".parquet")


@dataclass(frozen=True)
class Part:
    """Vectors of some images."""

    numbers: np.ndarray
    """(n,) int64, ascending: numbers of the images."""
    vectors: np.ndarray
    """(n, D) float32."""
    unreadable: list[str]
    """A line for each image that could not be read."""


class Parts:
    """A folder with vectors in parts. Each part is complete or absent, so that an interrupted run can continue.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, description: JsonObject) -> None:
        """Make the folder, or check that its parts are of the same images and encoder.

        Args:
            description: Values that identify images, encoder and settings.

        Raises:
            UserError: If the folder has parts of other images, or it cannot be written.
        """
        path = self.folder / "embedding.json"
        try:
            if not path.exists():
                self.remove()  # parts without a description may be of other images
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(path, description)
            before = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
        if before != description:
            raise UserError(
                f"{self.folder}: begun with other images, another encoder or other settings; delete it to begin again"
            )

    def __contains__(self, number: int) -> bool:
        return self._path(number).exists()

    def write(self, number: int, part: Part) -> None:
        """Write a part.

        Raises:
            UserError: If the disk is full, for example.
        """
        path = self._path(number)
        aside = path.with_suffix(".tmp")
        try:
            shutil.rmtree(aside, ignore_errors=True)  # left by an interrupted attempt
            aside.mkdir()
            np.save(aside / "numbers.npy", part.numbers)
            np.save(aside / "vectors.npy", part.vectors)
            write_json(aside / "unreadable.json", part.unreadable)
            os.replace(aside, path)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}; repeat the command to continue") from error

    def read(self, number: int) -> Part:
        """Read a part.

        Raises:
            UserError: If it is missing or damaged.
        """
        path = self._path(number)
        try:
            vectors = np.load(path / "vectors.npy", mmap_mode="r")  # not everybody who reads a part needs them
            return Part(np.load(path / "numbers.npy"), vectors, json.loads((path / "unreadable.json").read_text()))
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: cannot be read; delete it and repeat the command") from error

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}"


def check_out(out: Path) -> None:
    """Check the name of the file before any work.

    Raises:
        UserError: If the file has another suffix, or Parquet cannot be written here.
    """
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out}: must end in .npy or .parquet")
    if out.suffix == ".parquet":
        import_parquet()


def names_file(out: Path) -> Path:
    """Return the path of the file with the names of the images that belong to a .npy file."""
    return out.with_suffix(".names.txt")


def join(parts: Parts, count: int, rows: int, out: Path, name_of: Callable[[int], str]) -> None:
    """Write all parts into one file, one after the other. The file is replaced only when the new one is complete.

    Args:
        parts: The parts.
        count: Number of parts.
        rows: Number of vectors in all parts.
        out: The file, .npy or .parquet.
        name_of: Returns the name of an image by its number.

    Raises:
        UserError: If the file cannot be written.
    """
    in_order = (parts.read(number) for number in range(count))
    try:
        if out.suffix == ".parquet":
            _write_parquet(in_order, out, name_of)
        else:
            _write_npy(in_order, rows, out, name_of)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}; repeat the command to continue") from error


def _write_npy(parts: Iterator[Part], rows: int, out: Path, name_of: Callable[[int], str]) -> None:
    aside, names = (path.with_name(path.name + ".tmp") for path in (out, names_file(out)))
    begun = False
    with open(aside, "wb") as file, open(names, "w", encoding="utf-8", errors="surrogateescape") as lines:
        for part in parts:
            if not begun:  # not a memory map: a full disk would end the process without an error
                header = {"descr": "<f4", "fortran_order": False, "shape": (rows, part.vectors.shape[1])}
                np.lib.format.write_array_header_1_0(file, header)
                begun = True
            file.write(np.ascontiguousarray(part.vectors, dtype="<f4").tobytes())
            lines.writelines(name_of(int(number)).replace("\n", "\\n") + "\n" for number in part.numbers)
    os.replace(names, names_file(out))
    os.replace(aside, out)


def _write_parquet(parts: Iterator[Part], out: Path, name_of: Callable[[int], str]) -> None:
    parquet = import_parquet()
    import pyarrow

    aside = out.with_name(out.name + ".tmp")
    writer = None
    for part in parts:
        names = [name_of(int(number)).encode("utf-8", "backslashreplace").decode() for number in part.numbers]
        flat = pyarrow.array(part.vectors.reshape(-1), type=pyarrow.float32())
        vectors = pyarrow.FixedSizeListArray.from_arrays(flat, part.vectors.shape[1])
        table = pyarrow.table({"image": pyarrow.array(names, type=pyarrow.string()), "vector": vectors})
        writer = writer or parquet.ParquetWriter(aside, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
    os.replace(aside, out)
