"""The run folder: its files, its fingerprint, its Lightning checkpoints."""
