"""Which weights of an SAE belong to features."""

# They have the size of the output, and each of several ranks holds all of them.
OF_NO_FEATURE = ("b_dec", "W_skip")
