"""Builds the CPU backend, where it can be built; everything else stands in setup.cfg."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "striped_hf.optim.backends._cpu",
            ["striped_hf/optim/backends/csrc/cpu.c"],
            # errno and trapping would keep square roots and comparisons from being vectorised
            extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"],
            extra_link_args=["-fopenmp"],
            optional=True,  # the install goes on without a compiler or OpenMP, to use reference.py
        )
    ]
)
