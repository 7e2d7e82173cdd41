"""What measures. Run each from the repository's root: ``python -m benchmarks.optimizers``."""
