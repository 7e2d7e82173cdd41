"""Builds the CPU backend where that is possible; everything else is in setup.cfg."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "striped_hf.optim.backends._cpu",
            ["striped_hf/optim/backends/csrc/cpu.c"],
            # errno and trapping would keep square roots and comparisons from being vectorised
            extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"],
            extra_link_args=["-fopenmp"],
            optional=True,  # without a compiler or OpenMP, reference.py does the work
        )
    ]
)
