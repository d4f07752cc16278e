"""What is predicted at hidden cells."""
