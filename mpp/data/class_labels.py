"""Read the labels of images in shards, and check the names of classes."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from pathlib import Path

from mpp.data.shards.index import packed_first
from mpp.data.shards.reader import ShardImages
from mpp.errors import UserError


def read_labels(images: ShardImages, shard: int, row: int) -> list[str]:
    """Return the names in the list `labels` of a sample's .json file.

    Raises:
        UserError: If there is no such list of names.
    """
    stored, name = images.read_label(shard, row), images.name(shard, row)
    try:
        values = json.loads(stored[0])["labels"] if stored is not None and stored[1] else None
    except (ValueError, KeyError, TypeError, RecursionError):
        values = None
    if not isinstance(values, list) or not all(isinstance(v, str | int) and not isinstance(v, bool) for v in values):
        raise UserError(f"{name}: requires a .json file in the same folder with 'labels', a list of names")
    return [class_name(str(value), name) for value in values]


def class_name(value: str, where: str) -> str:
    """Return the name of a class without spaces and byte order mark around it.

    Raises:
        UserError: If the name is empty, or contains control characters or invalid text.
    """
    name = value.strip().removeprefix("\ufeff")
    if not name:
        raise UserError(f"{where}: an empty label")
    if odd := [c for c in name if unicodedata.category(c) in ("Cc", "Cs")]:
        raise UserError(f"{where}: label {value!r} holds the character {odd[0]!r}, which is no text")
    return name


def stored_label(images: ShardImages, shard: int, row: int) -> str | int | None:
    """Return the label of an image in a shard: a number, a name, or None if it has none.

    Raises:
        UserError: If the label is neither a number nor a name.
    """
    stored = images.read_label(shard, row)
    return None if stored is None else _parsed_label(*stored, where=images.name(shard, row))


def read_label(images: ShardImages, shard: int, row: int) -> str | int:
    label = stored_label(images, shard, row)
    if label is None:
        why = f"; {images.left_out}" if images.left_out else ""
        raise UserError(f"{images.name(shard, row)}: no label beside it (.cls, or .json with a 'label'){why}")
    return label


def _parsed_label(data: bytes, is_json: bool, where: str) -> str | int:
    try:
        value = json.loads(data)["label"] if is_json else data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{where}: its {'.json' if is_json else '.cls'} is not text in UTF-8") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{where}: its .json has no 'label'") from None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UserError(f"{where}: a label is a whole number or a name; got {json.dumps(value)}")
    if isinstance(value, str):
        value = class_name(value, where)
        if re.fullmatch(r"-?(0|[1-9][0-9]{0,8})", value):  # 007 is a name, and differs from 7
            value = int(value)
    if isinstance(value, int) and value < 0:
        raise UserError(f"{where}: label {value} is negative")
    return value


def listed_classes(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error


def classes_of_parquet(folder: str, spec: str) -> str:
    """Return the end of a message about a folder without images: advice if it holds Parquet files, else ''."""
    return f"; {packed_first(spec)}" if any(Path(folder).rglob("*.parquet")) else ""
