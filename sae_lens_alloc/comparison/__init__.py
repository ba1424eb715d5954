"""SAEs of several architectures, trained on the same activations and compared at equal L0."""
