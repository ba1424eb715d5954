"""The demo, with a small language model and its corpus, so that it runs offline."""
