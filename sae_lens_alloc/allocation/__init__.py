"""Who gets the budget: pure functions of tensors, without SAELens."""
