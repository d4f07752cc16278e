"""The adapter between masked-patch pretraining and timm's encoders."""
