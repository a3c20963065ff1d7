"""Package metadata. The benchmark runs from the repository and is not installed."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

BENCHMARK = ["torchmetrics>=1.4", "matplotlib>=3.8", "rich>=13"]
PEERS = ["cache-dit>=1.5"]
TEST = [
    *BENCHMARK,
    *PEERS,
    "accelerate",
    "hypothesis>=6.100",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.5",
    "scikit-image>=0.22",
]

setup(
    name="xfuser_adacorr",
    version="0.2.0",
    description="Skips steps of diffusion samplers, and repairs the latents for what that missed",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["xfuser_adacorr", "xfuser_adacorr.*"]),
    package_data={"xfuser_adacorr": ["py.typed"]},
    install_requires=[
        "torch>=2.4",
        "diffusers>=0.42",
        "transformers>=4.56",
        "huggingface_hub",
        "safetensors",
        "numpy",
        "scipy>=1.11",
        "PyYAML",
        "tqdm",
        'xfuser>=0.7; platform_system == "Linux"',
    ],
    extras_require={
        "benchmark": BENCHMARK,
        "inception": ["torch-fidelity>=0.3"],
        "peers": PEERS,
        "test": TEST,
        "dev": [*TEST, "ruff>=0.8"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
