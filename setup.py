"""The packages: those of `src`, and the embedded model, which keeps its place in the repository."""

from setuptools import find_packages, setup

MODEL = "stepweave.models.shapes"

setup(
    packages=[*find_packages("src"), MODEL],
    package_dir={"": "src", MODEL: "models/shapes"},
)
