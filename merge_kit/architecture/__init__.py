"""What a checkpoint is as a model: layer stacks, config.json, ties, vocabularies, side files."""
