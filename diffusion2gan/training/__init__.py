"""The training loop of the distillation, its state and its log."""
