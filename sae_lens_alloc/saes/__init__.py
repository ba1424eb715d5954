"""The SAELens architectures, one a file."""
