"""Types of recipe values, with their limits, short forms and messages."""

from __future__ import annotations

import math
import os
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    Strict,
    WithJsonSchema,
)


def no_bool(value: object) -> object:
    """Refuse booleans, because lax validation would turn `true` into 1."""
    if isinstance(value, bool):
        raise ValueError("true/false is not a number")
    return value


def _countable(value: int) -> int:
    """Refuse numbers so large that a float or a C integer cannot hold them."""
    if value > 10**15:
        raise ValueError("must be at most 10^15")
    return value


Bool = Annotated[bool, Strict()]
"""true or false. `yes` is a string in YAML 1.2 and is not accepted."""
Int = Annotated[int, BeforeValidator(no_bool)]
Float = Annotated[float, BeforeValidator(no_bool), Field(allow_inf_nan=False)]
PositiveInt = Annotated[int, BeforeValidator(no_bool), AfterValidator(_countable), Field(ge=1)]
NonNegativeInt = Annotated[int, BeforeValidator(no_bool), AfterValidator(_countable), Field(ge=0)]
PositiveFloat = Annotated[float, BeforeValidator(no_bool), Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, BeforeValidator(no_bool), Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, BeforeValidator(no_bool), Field(ge=0, le=1)]
"""A number in [0, 1]."""
BelowOne = Annotated[float, BeforeValidator(no_bool), Field(ge=0, lt=1)]
"""A number in [0, 1)."""


def _ratio(value: object) -> float | tuple[float, float]:
    ends = value if isinstance(value, list | tuple) else (value, value)
    if len(ends) != 2 or any(isinstance(v, bool) or not isinstance(v, int | float) for v in ends):
        raise ValueError("must be one number or [lowest, highest]")
    low, high = ends
    if not 0 < low < 1 or not 0 < high < 1:
        raise ValueError("must be > 0 and < 1")
    if low > high:
        raise ValueError("the lower end comes first")
    return (low, high) if isinstance(value, list | tuple) else low


Aspect = Annotated[float, BeforeValidator(no_bool), Field(ge=1, le=100)]
"""Longer side of a block divided by its shorter side."""
_OPEN = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
Ratio = Annotated[
    float | tuple[float, float],
    PlainValidator(_ratio),
    PlainSerializer(lambda value: value, return_type=Any),
    WithJsonSchema({"anyOf": [_OPEN, {"type": "array", "items": _OPEN, "minItems": 2, "maxItems": 2}]}),
]
"""Fraction of the mask units that is hidden: a number in (0, 1), or a range from which each batch draws a number."""
MOST_CHANNELS = 1024
"""Most channels of an image (a guess)."""


def _size(value: object) -> object:
    """Turn one number into two: 32 means 32×32."""
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


ImageSize = Annotated[
    tuple[PositiveInt, PositiveInt],
    BeforeValidator(_size, json_schema_input_type=PositiveInt | tuple[PositiveInt, PositiveInt]),
]


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("the lower end comes first")
    return value


Range = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ordered)]
AreaRange = Annotated[
    tuple[Annotated[Float, Field(gt=0, le=1)], Annotated[Float, Field(gt=0, le=1)]], AfterValidator(_ordered)
]


def growing(value: tuple[float, float]) -> tuple[float, float]:
    if not (math.isfinite(value[0]) and math.isfinite(value[1]) and value[0] < value[1]):
        raise ValueError("two finite numbers, the smaller one first")
    return value


def listed(value: object) -> object:
    return (value,) if isinstance(value, str) or type(value) is int else value


def _no_words_for_switches(args: TimmArgs) -> dict[str, Any]:
    """Refuse words in place of booleans, because Python treats any text as true, even "no" and "false"."""
    for key, value in args.items():
        if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off", "true", "false"):
            raise ValueError(f"{key}: '{value}' is text; write true or false")
    return args


TimmArgs = Annotated[dict[str, Any], AfterValidator(_no_words_for_switches)]
"""Arguments of a timm model, by name."""


def each_once(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) != len(values):
        raise ValueError("each once")
    return values


LabelCounts = Annotated[
    tuple[PositiveInt, ...],
    BeforeValidator(
        lambda value: (value,) if isinstance(value, int) and not isinstance(value, bool) else value,
        json_schema_input_type=PositiveInt | Annotated[tuple[PositiveInt, ...], Field(min_length=1)],
    ),
    AfterValidator(each_once),
    Field(min_length=1),
]
"""Numbers of labels per class, each once. 100 means [100]."""


def _path(value: str) -> str:
    if "\0" in value or not value:
        raise ValueError("not a path")
    return os.path.expanduser(value)


def _number_as_name(value: object) -> object:
    """Turn a whole number into a name, because YAML reads the folder name 2024 as a number."""
    return str(value) if type(value) is int else value


FilePath = Annotated[str, BeforeValidator(_number_as_name, json_schema_input_type=str), AfterValidator(_path)]
"""A file, folder, pattern or URL. `~` is the home folder."""
Places = Annotated[
    tuple[FilePath, ...],
    BeforeValidator(listed, json_schema_input_type=FilePath | Annotated[tuple[FilePath, ...], Field(min_length=1)]),
    Field(min_length=1),
]
"""A file, folder, pattern or URL, or a list of them."""


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", value):
        raise ValueError("must be auto, cpu, cuda, one CUDA device such as cuda:1, or mps")
    return value


Device = Annotated[str, AfterValidator(_device)]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
Probe = Literal["knn", "linear", "attentive"]
Format = Literal["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "NPY", "PPM", "DICOM"]
"""Image formats by Pillow's names, NPY for numpy's .npy files, and DICOM."""
ALL_FORMATS: tuple[Format, ...] = get_args(Format)
FORMATS: tuple[Format, ...] = tuple(name for name in ALL_FORMATS if name != "GIF")
"""Formats that are read unless a recipe names others: all but GIF, whose images may be animations."""

IMAGE = re.compile(r"\.(jpe?g|jpe|jfif|png|webp|bmp|tiff?|gif|p[bgnp]m|npy|dcm|dicom)$", re.IGNORECASE)
IMAGE_ENDINGS = ".jpg .jpeg .jpe .jfif .png .webp .bmp .tif .tiff .gif .ppm .pgm .pbm .pnm .npy .dcm .dicom"
"""The endings that IMAGE matches, for messages."""


def checked_extension(extension: str) -> str:
    """Return the extension of a sample's image, such as `rgb.png`, in lower case and without a dot at the start.

    Raises:
        ValueError: If it does not end with the extension of an image format.
    """
    extension = extension.removeprefix(".").lower()
    if not IMAGE.search(f"x.{extension}") or "/" in extension:
        raise ValueError(f"what follows the name of a sample, ending in one of {IMAGE_ENDINGS}")
    return extension


ImageExtension = Annotated[str, AfterValidator(checked_extension)]
"""Extension of a sample's image, such as `rgb.png`: what follows the name of the sample."""
