"""What frozen features are worth, by three simple readers of them."""
