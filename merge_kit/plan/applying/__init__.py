"""Adapters on top of models: every tensor of the base, with what adapters add to it."""
