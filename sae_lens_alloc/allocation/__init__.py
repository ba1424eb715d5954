"""Which pairs get the budget: pure functions of tensors, without SAELens."""
