"""Probes of frozen features, with a file for each kind."""

ARMS = {
    "encoder": "the encoder",
    "compare": "the other encoder",
    "random": "the same, at random initialisation",
    "pixels": "raw pixels",
}
"""Name of an arm -> its name in sentences."""
PROTOCOL = (
    "linear: L-BFGS on features of one central crop of each image; not comparable with the linear probes of papers, "
    "which MAE trains by SGD on random crops for 90 epochs"
)
"""Note that is printed with every figure of the linear probe."""
