"""Corruptions: what the encoder sees at hidden cells. Hidden pixels are blanked or replaced, unless kept on purpose."""
