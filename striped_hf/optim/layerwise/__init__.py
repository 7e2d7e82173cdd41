"""The step in two phases: gradients are folded into the state during backward, and freed."""
