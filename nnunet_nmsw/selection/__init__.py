"""Which windows to spend patches on: one interface, `Selector`, for training, prediction and comparison."""
