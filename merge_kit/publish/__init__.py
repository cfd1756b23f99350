"""Manifest, model card, the atomic appearance of the output, verification."""
