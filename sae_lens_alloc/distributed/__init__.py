"""Many processes that train one SAE: who they are, what they send, and which features each has."""
