"""Adapters that are made of adapters: their modules, factors, names and files."""
