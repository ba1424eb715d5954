"""From a YAML file, or a config made in Python, to a checked run."""
