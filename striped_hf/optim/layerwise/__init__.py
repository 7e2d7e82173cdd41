"""The step in two phases: the backward pass folds gradients into the state and frees them."""
