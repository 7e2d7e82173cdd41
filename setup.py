"""Builds the C library of the CPU backend where that is possible; the rest is in setup.cfg."""

from pathlib import Path

from setuptools import Extension, setup

CSRC = Path("striped_hf/optim/backends/csrc")

setup(
    ext_modules=[
        Extension(
            "striped_hf.optim.backends._cpu",
            [str(CSRC / "cpu.c")],
            depends=sorted(map(str, CSRC.glob("*.h"))),  # a change rebuilds, and an sdist has them
            # errno and trapping would keep square roots and comparisons from being vectorized
            extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"],
            extra_link_args=["-fopenmp"],
            optional=True,  # without a compiler or OpenMP, reference.py does the work
        )
    ]
)
