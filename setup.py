"""The distribution `tinysr-kernels`: the package `tinysr_kernels` and the command `tinysr`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """Read the version from the source text: importing the package would need its requirements."""
    text = (HERE / "tinysr_kernels" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("tinysr_kernels/_version.py does not define __version__")
    return match.group(1)


RUNTIME = [
    "torch>=2.11",
    "numpy>=1.26",
    "pillow>=11.3",
    "safetensors>=0.5",
    "tqdm>=4.66",
]

VIDEO = ["av>=16"]

TEST = [
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    # Oracles: the networks are held against diffusers' own modules, the images against scikit-image.
    "diffusers>=0.35",
    "transformers>=4.50",
    "scikit-image>=0.25",
    "matplotlib>=3.9",  # the benchmarks' pictures
    # Readers of 16-bit files that share no code with Pillow.
    "imagecodecs>=2025.3.30",
    "tifffile>=2025.3.30",
    "triton>=3.6; sys_platform == 'linux'",  # its interpreter runs the kernels, its compiler checks them
]

setup(
    name="tinysr-kernels",
    version=version(),
    description="One-step diffusion super-resolution with fused operators and weights folded at load time",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    # 3.14 is left out until the supported pairs of torch and triton have been tried on it.
    python_requires=">=3.10,<3.14",
    # The wheel carries this one package; model/, tests/ and the tools are used from a checkout.
    packages=find_packages(include=["tinysr_kernels", "tinysr_kernels.*"]),
    package_data={"tinysr_kernels": ["py.typed", "**/*.safetensors", "**/*.json"]},
    install_requires=RUNTIME,
    extras_require={
        "video": VIDEO,
        # torch's CUDA builds bring the Triton they were built with; named for builds that do not.
        "gpu": ["nvidia-ml-py>=12", "triton>=3.6; sys_platform == 'linux'"],
        "test": TEST + VIDEO,
        "train": ["scikit-image>=0.25", "matplotlib>=3.9"],
        "dev": ["ruff", "mypy>=1.15", "build>=1.2", "setuptools>=77"],
    },
    entry_points={"console_scripts": ["tinysr = tinysr_kernels.cli.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Multimedia :: Graphics",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
