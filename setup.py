"""Installs megadpo: ``pip install -e .`` (add ``-c constraints.txt`` for the exact versions it was proven with)."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="megadpo",
    version="0.1.0",
    description="Preference training (DPO) of large language models with Megatron-core, from one CPU to many GPUs",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megadpo", "megadpo.*"]),
    package_data={"megadpo": ["py.typed"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16,<0.17",
        "transformers>=5.3",
        "tokenizers>=0.22",
        "safetensors>=0.4.5",
        "datasets>=4.0",
        "pyarrow>=17",
        "numpy>=1.26",
        "jinja2>=3.1.6",
        "pyyaml>=6.0",
        "tqdm>=4.66",
        "tensorboard>=2.16",
        "sentencepiece>=0.2",
        "protobuf>=4.25",
        "packaging>=23",
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.19,<0.20"],
        "mpi": ["mpi4py>=4.0"],
        "dev": [
            'trl>=1.16,<1.17; python_version >= "3.11"',
            "peft>=0.18",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.14",
            "types-PyYAML",
            "psutil>=6",
            "deepspeed>=0.19,<0.20",
            "mpi4py>=4.0",
        ],
    },
    entry_points={"console_scripts": ["megadpo = megadpo.cli:console"]},
)
