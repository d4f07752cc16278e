"""How a prediction is compared with its target, on predicted cells only, in float32."""
