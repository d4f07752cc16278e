"""Pictures and numbers that show what was learned."""
