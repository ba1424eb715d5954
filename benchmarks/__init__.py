"""Time and memory of training steps: ours, SAELens' and those of other libraries."""
