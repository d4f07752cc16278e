"""Losses: they compare predictions with targets, on predicted cells only, in float32."""
