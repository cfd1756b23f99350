"""Values without torch and without disk."""
