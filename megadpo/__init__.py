"""megadpo: preference training of large language models with Megatron-core, from one CPU to many GPUs.

    import megadpo
    result = megadpo.train({"model": {"path": "my-model"}, "data": {"train": "pairs.jsonl"}, "output_dir": "run"})

Importing this package imports neither torch nor transformers and changes nothing in them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from megadpo.config import Config, load_config
from megadpo.errors import UserError

if TYPE_CHECKING:
    from megadpo.train import Result

__version__ = "0.1.0"
__all__ = ["Config", "UserError", "__version__", "load_config", "train"]


def train(config: Config | Mapping[str, Any] | str | Path, callbacks: Any = ()) -> Result:
    """Trains as ``megadpo train`` does, in this process or as one rank of a torchrun job.

    Args:
        config: a Config, a nested dict or the path of a YAML file; `data.train`, `data.eval` may be `datasets.Dataset`.
        callbacks: called at the end of steps, evaluations and saves; see `megadpo.train.run_training`.

    Returns:
        The metrics and the path of the exported Hugging Face directory.

    Raises:
        UserError: anything in the configuration, the model or the data that the caller can put right.
    """
    from megadpo.train import run_training

    return run_training(load_config(config), callbacks)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # The import system would put the submodule megadpo.train where the function megadpo.train is.
        if name == "train" and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
