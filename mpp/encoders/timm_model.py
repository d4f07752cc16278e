"""The type of timm's models."""

from __future__ import annotations

from typing import Any, TypeAlias

TimmModel: TypeAlias = Any
"""A timm model. All families have attributes such as `forward_features` and `feature_info`, but no common base class
declares them."""
