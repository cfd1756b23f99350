"""Bytes of checkpoints: headers, folders, reading, writing."""
