"""The GPU backend: kernels in Triton, and their launches."""
