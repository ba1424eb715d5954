"""A small language model and its corpus, so that everything here runs offline."""
