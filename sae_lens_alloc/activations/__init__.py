"""Where activations come from: language models, datasets, the store that mixes them."""
