"""Packaging of solo-gating; see README.md for installing it beside either solo-learn line."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "solo_gating/__init__.py").read_text(encoding="utf-8"), re.M
)[1]

# `configs/` stays at the top level, where solo-learn users look for it, and is installed inside
# the package.
CONFIG_FOLDERS = [
    "configs",
    *(f"configs/{d.name}" for d in (HERE / "configs").iterdir() if d.is_dir()),
]

DEVICE = ["kornia>=0.7"]
EXPORT = ["onnx", "onnxscript", "onnxruntime"]
BENCHMARK = [*EXPORT, "openvino", "nncf"]

setup(
    name="solo-gating",
    version=VERSION,
    description=(
        "A solo-learn plugin: one self-supervised pre-training gives a dense encoder and a gated "
        "one that computes only the channels an image needs."
    ),
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=[
        *find_packages(include=["solo_gating", "solo_gating.*", "solo_gating_runtime"]),
        *(
            folder.replace("configs", "solo_gating.configs", 1).replace("/", ".")
            for folder in CONFIG_FOLDERS
        ),
    ],
    package_dir={"solo_gating.configs": "configs"},
    package_data={
        "": ["*.yaml"],
        "solo_gating": ["py.typed"],
        "solo_gating.deploy": ["cpp_files/*"],
        "solo_gating.report": ["published.json"],
        "solo_gating_runtime": ["py.typed", "kernel/*.*", "kernel/*/*.h"],
    },
    python_requires=">=3.10,<3.14",
    install_requires=[
        # From 2.6 on torch.load runs no code of a checkpoint, in solo-learn's scripts either.
        "torch>=2.6",
        "torchvision>=0.21",
        "lightning>=2.1.2",
        "torchmetrics>=0.11",
        "hydra-core>=1.3",
        "omegaconf>=2.3",
        "numpy",
        "pillow",
        "matplotlib",
        "scikit-learn",
        "tqdm",
        # What solo-learn imports, which is installed without its pins (see README.md).
        "einops",
        "scipy",
        "timm",
    ],
    extras_require={
        "umap": ["umap-learn"],
        "device": DEVICE,
        "export": EXPORT,
        "benchmark": BENCHMARK,
        "wandb": ["wandb"],
        "dev": [
            "pytest",
            "pytest-xdist",
            "ruff",
            "mypy",
            "build",
            "umap-learn",
            *BENCHMARK,
            *DEVICE,
        ],
    },
    entry_points={
        "console_scripts": [
            "solo-gating = solo_gating.__main__:main",
            "solo-gating-pretrain = solo_gating.main_pretrain:main",
            "solo-gating-flops = solo_gating.main_flops:main",
            "solo-gating-linear = solo_gating.main_linear:main",
            "solo-gating-knn = solo_gating.main_knn:main",
            "solo-gating-policy = solo_gating.main_policy:main",
            "solo-gating-umap = solo_gating.main_umap:main",
            "solo-gating-report = solo_gating.main_report:main",
            "solo-gating-export = solo_gating.main_export:main",
            "solo-gating-benchmark = solo_gating.main_benchmark:main",
            "solo-gating-benchmark-data = solo_gating.main_benchmark_data:main",
            "solo-gating-benchmark-train = solo_gating.main_benchmark_train:main",
        ]
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
