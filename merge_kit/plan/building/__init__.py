"""Stages that build a model of another structure: other layers, experts, or sizes."""
