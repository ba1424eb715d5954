"""The campaign on a GPU: all that is to be measured there, in one command that keeps what it has."""
