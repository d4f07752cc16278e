"""The type of timm's models."""

from __future__ import annotations

from typing import Any, TypeAlias

TimmModel: TypeAlias = Any
"""A model of timm's. Its families agree on names (`forward_features`, `feature_info`), and share no class that has
them."""
