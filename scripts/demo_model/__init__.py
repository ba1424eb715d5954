"""How the demo's corpus and language model were made."""
