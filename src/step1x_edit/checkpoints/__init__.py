"""Checkpoints on disk: recognising, reading and translating them."""
