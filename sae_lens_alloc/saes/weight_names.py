"""Which weights of an SAE belong to features."""

# They have the size of the output, and each of several ranks holds all of them.
OF_NO_FEATURE = ("b_dec", "W_skip")
# The buffer of a transcoder that is subtracted from its inputs, which belongs to no feature either.
INPUT_MEAN = "input_mean"
