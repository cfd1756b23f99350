"""Adapters that are extracted from fine-tuned models."""
