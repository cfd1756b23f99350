"""Runs a plan: a pool of workers over its steps, a journal, progress events. Prints nothing."""
