"""From a YAML file, or a config made in Python, to a run that has been checked."""
