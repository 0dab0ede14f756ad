"""Installs megadpo: ``pip install -e .`` (add ``-c constraints.txt`` for the exact versions it was proven with).

The C++ of csrc/ is compiled where there is a compiler. Without one, or where it fails, the installation goes on: megadpo
tries again on first use, and then says that it does without.
"""

import runpy
import shutil
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
NATIVE = runpy.run_path(str(HERE / "megadpo" / "platform" / "native.py"))


class BuildPackage(build_py):
    """Puts the sources of csrc/ into the package, for what is compiled on first use; a checkout has them already."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "megadpo" / "csrc"
            target.mkdir(parents=True, exist_ok=True)
            for source in (source for library in NATIVE["LIBRARIES"].values() for source in library.sources):
                shutil.copy(HERE / "csrc" / source, target / source)


def extension(library: Any) -> Extension:
    """A C++ library of csrc/ as megadpo/_NAME.*so."""
    return Extension(
        f"megadpo._{library.name}",
        [f"csrc/{library.sources[0]}"],
        depends=[f"csrc/{source}" for source in library.sources],
        extra_compile_args=[*library.flags, *NATIVE["definitions"](NATIVE["source_key"](library))],
        language="c++",
        optional=True,
    )


setup(
    name="megadpo",
    version="0.1.0",
    description="Preference training (DPO) of large language models with Megatron-core, from one CPU to many GPUs",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megadpo", "megadpo.*"]),
    package_data={"megadpo": ["py.typed"], "megadpo.pages": ["page.css", "page.js"]},
    ext_modules=[extension(library) for library in NATIVE["LIBRARIES"].values() if not library.is_cuda],
    cmdclass={"build_py": BuildPackage},
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
        "rich>=13",
        "tensorboard>=2.16",
        "sentencepiece>=0.2",
        "protobuf>=4.25",
        "packaging>=23",
        "xxhash>=3.4",
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.19,<0.20"],
        "mpi": ["mpi4py>=4.0"],
        "report": ["matplotlib>=3.8"],
        "wandb": ["wandb>=0.19"],
        "mlflow": ["mlflow-skinny>=3.0"],
        "trackio": ["trackio>=0.10"],
        "swanlab": ["swanlab>=0.6"],
        "harness": ["lm-eval[hf]>=0.4.13,<0.5"],
        "quantization": ["bitsandbytes>=0.46"],
        "dev": [
            'trl>=1.16,<1.17; python_version >= "3.11"',
            "peft>=0.18",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.14",
            "types-PyYAML",
            "psutil>=6",
            "deepspeed>=0.19,<0.20",
            "mpi4py>=4.0",
            "matplotlib>=3.8",
            "wandb>=0.19",
            "mlflow-skinny>=3.0",
            "trackio>=0.10",
            "swanlab>=0.6",
            "lm-eval[hf]>=0.4.13,<0.5",
            "bitsandbytes>=0.46",
            "pyte>=0.8",
            "triton>=3.2; platform_system == 'Linux'",
        ],
    },
    entry_points={"console_scripts": ["megadpo = megadpo.cli:console"]},
)
