"""What frozen features are worth: a file for each kind of probe."""

ARMS = {
    "encoder": "the encoder",
    "compare": "the other encoder",
    "random": "the same, at random initialisation",
    "pixels": "raw pixels",
}
"""What is probed, in words."""
PROTOCOL = (
    "linear: L-BFGS on features of one central crop of each image; not comparable with the linear probes of papers, "
    "which MAE trains by SGD on random crops for 90 epochs"
)
"""Said with every figure of the linear probe."""
