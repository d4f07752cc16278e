"""What the encoder sees at hidden cells. Every corruption blanks the hidden pixels first."""
