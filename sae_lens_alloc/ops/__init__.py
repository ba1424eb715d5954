"""How an allocation runs fast: blocked encode-and-select, sparse decode and their gradients."""
