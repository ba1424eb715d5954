"""Trainer and runner on top of SAELens' own: checkpoints, resuming, fine-tuning."""
