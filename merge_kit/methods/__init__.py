"""The maths: base, registry, reductions, noise, and one file per method."""
