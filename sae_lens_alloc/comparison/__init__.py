"""SAEs of several architectures that are trained on the same activations and compared at equal L0."""
