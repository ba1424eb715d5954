"""Trainer and runner on top of SAELens' own."""
