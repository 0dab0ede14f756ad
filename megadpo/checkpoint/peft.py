"""PEFT directories: adapter_config.json and adapter_model.safetensors, read strictly, and written so that PEFT reads them.

Tensors have PEFT's names; inside megadpo these are without ``base_model.model.`` (adapters/spec.py). Pickles are not opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadpo.checkpoint.companions import Companions, write_companions
from megadpo.checkpoint.digest import model_files_digest
from megadpo.checkpoint.export import write_json
from megadpo.checkpoint.hf import hf_directory, read_json
from megadpo.checkpoint.peft_settings import CONFIG_NAME, WEIGHTS_NAME, PeftSettings, spec_of
from megadpo.checkpoint.peft_tensors import (
    PREFIX,
    PeftSource,
    check_copies,
    check_tensors,
    leave_out_tied_head,
    own_name,
    take_copies,
    weights_file,
)
from megadpo.checkpoint.sharded import INDEX, Checkpoint, is_checkpoint, open_checkpoint
from megadpo.checkpoint.staging import publish, staging
from megadpo.checkpoint.tensor_file import write_tensor_file
from megadpo.errors import UserError
from megadpo.model.adapters.beginnings import DECOMPOSED
from megadpo.model.adapters.spec import (
    MAGNITUDE,
    AdapterSpec,
    adapter_shapes,
    matching,
)
from megadpo.model.families import HEAD, TensorSource
from megadpo.model.families.common import EMBEDDING
from megadpo.model.shape import ModelShape

BASE_DIGEST = "megadpo_base"
"""The key of adapter_model.safetensors' metadata under which the digest of the base's files stands."""


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter of a PEFT directory, opened for a model.

    Attributes:
        source: its tensors under the names of `adapter_shapes`.
        base: the model that its adapter_config.json names; None: it names none.
        base_digest: of the base's files, where megadpo wrote the directory.
    """

    path: Path
    spec: AdapterSpec
    source: TensorSource
    base: str | None
    base_digest: str | None

    def check_base(self, path: str, digest: str, setting: str) -> None:
        """Refuse a base that is known to be another model than the adapter's.

        Args:
            path, digest: of the base's directory and files.
            setting: the option that names the adapter, for the sentence.

        Raises:
            UserError: its files are not those that the adapter was trained on.
        """
        is_other = False
        if self.base_digest is not None:
            is_other = self.base_digest != digest
        elif self.base is not None and Path(self.base).is_dir() and Path(self.base).resolve() != Path(path).resolve():
            is_other = model_files_digest(hf_directory(self.base), Path(self.base)) != digest
        if is_other and self.base is not None and Path(self.base).resolve() == Path(path).resolve():
            raise UserError(
                f"{setting}: the files of {path} have changed since {self.path} was trained on them, or its {CONFIG_NAME} "
                "names another base than that; give the right one"
            )
        if is_other:
            raise UserError(
                f"{setting}: {self.path} belongs to {self.base or 'another model'}, whose files are not those of {path}; "
                "use the model that it was trained on"
            )

    def check_copies(self, base: TensorSource, path: str, setting: str) -> None:
        """Refuse an adapter that has other weights of its base beside it than that has: they are not read from here.

        Args:
            base, path: the base's tensors and directory.
        """
        other = self.source.other_than(base) if isinstance(self.source, PeftSource) else None
        if other is not None:
            raise UserError(
                f"{setting}: {self.path} has weights of its base itself ({other}), as PEFT writes them beside an adapter of "
                f"the embedding or the head, and they are not those of {path}; give the base that it was trained on"
            )


def is_peft_directory(path: str | Path) -> bool:
    """Whether a directory holds an adapter of PEFT."""
    return (Path(path) / CONFIG_NAME).is_file()


def is_adapter(path: str | Path) -> bool:
    """Whether a directory holds an adapter: of PEFT, or one of our checkpoints of a run with adapters."""
    if is_checkpoint(path):
        return "adapter" in open_checkpoint(path, verify=False).state
    return is_peft_directory(path)


def adapter_files(path: str | Path) -> list[Path]:
    """The files of a directory that say what its adapter computes: its settings and its tensors."""
    settings = INDEX if is_checkpoint(path) else CONFIG_NAME
    return [Path(path) / settings, *sorted(Path(path).glob("*.safetensors"))]


def is_reward_adapter(path: str | Path) -> bool:
    """Whether the adapter of a directory makes a reward model of its base (PEFT's task type SEQ_CLS)."""
    values = (
        open_checkpoint(path, verify=False).state["adapter"] if is_checkpoint(path) else read_json(Path(path) / CONFIG_NAME)
    )
    return isinstance(values, dict) and values.get("task_type") == "SEQ_CLS"


def base_of(path: str | Path) -> str:
    """The directory of the model that the adapter of a directory belongs to.

    Raises:
        UserError: the directory names none, or one that is no directory here.
    """
    if is_checkpoint(path):
        where, settings = Path(path), _settings_of(open_checkpoint(path, verify=False)).values
    else:
        where, settings = Path(path) / CONFIG_NAME, read_json(Path(path) / CONFIG_NAME)
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(
            f"{where} names no base model (base_model_name_or_path); set model.path to the model and adapter.path to {path}"
        )
    if not Path(name).is_dir():
        raise UserError(
            f"{where} names the base model {name}, which is no directory here; download it, set model.path to where it "
            f"is and adapter.path to {path}"
        )
    if is_adapter(name):
        raise UserError(f"{where} names the base model {name}, which is an adapter itself; merge that one first")
    return name


def open_adapter(
    path: str | Path, shape: ModelShape, setting: str, dropout: float | None = None, verify: bool = True
) -> PeftAdapter:
    """Open the adapter of a PEFT directory or of one of our checkpoints for a model of this shape.

    Args:
        verify: every file of a checkpoint is hashed.
        setting: the option that names `path`, for sentences.
        dropout: of its input while it is trained on; None: what the settings say.

    Raises:
        UserError: no adapter, one that is not LoRA or has what megadpo does not build, one of another model, or damaged.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"{setting}: there is no directory {path}; give a PEFT directory, which has an {CONFIG_NAME}")
    if is_checkpoint(directory):
        return _open_checkpoint_s(directory, shape, setting, dropout, verify)
    if not is_peft_directory(directory):
        raise UserError(
            f"{setting}: {path} is no PEFT directory (it has no {CONFIG_NAME}), nor a "
            "checkpoint (checkpoints/step_…) of a run with adapters"
        )
    settings = PeftSettings(read_json(directory / CONFIG_NAME), directory / CONFIG_NAME)
    settings.check()
    file = weights_file(directory)
    names = {own_name(key, file.path): key for key in sorted(file.keys)}
    copies = take_copies(names)
    if shape.tied_embeddings and HEAD in names:
        leave_out_tied_head(file, names)
    spec = spec_of(settings, names, shape, dropout)
    expected = adapter_shapes(shape, spec)
    check_tensors(file, names, expected)
    check_copies(file, copies, spec, shape)
    base = settings.values.get("base_model_name_or_path")
    digest = file.metadata().get(BASE_DIGEST)
    source = PeftSource(file, {name: names[name] for name in expected}, copies)
    return PeftAdapter(directory, spec, source, base if isinstance(base, str) and base else None, digest)


def _open_checkpoint_s(directory: Path, shape: ModelShape, setting: str, dropout: float | None, verify: bool) -> PeftAdapter:
    checkpoint = open_checkpoint(directory, verify)
    if "adapter" not in checkpoint.state:
        raise UserError(f"{setting}: {directory} is the checkpoint of a whole model; give one of a run with adapters")
    if verify:
        checkpoint.check_files()
    settings, source = _settings_of(checkpoint), checkpoint.source("weights")
    if (how := settings.values.get("init_lora_weights")) in DECOMPOSED:
        raise UserError(
            f"{setting}: the adapter of {directory} began as a part of its base (adapter.init {how}), whose files it does "
            "not fit; take hf/ of its run, where it is a plain one (the same command goes on with a run that has not ended)"
        )
    spec = spec_of(settings, source.names(), shape, dropout)
    for name, size in adapter_shapes(shape, spec).items():
        if name not in source.names() or source.shape(name) != size:
            raise UserError(f"{directory}: its tensor {name} is missing or does not fit the model; it is another model's")
    inputs = checkpoint.state.get("inputs")
    digest = inputs.get("model") if isinstance(inputs, dict) else None
    return PeftAdapter(directory, spec, source, settings.values.get("base_model_name_or_path"), digest)


def _settings_of(checkpoint: Checkpoint) -> PeftSettings:
    values = checkpoint.state.get("adapter")
    if not isinstance(values, dict):
        raise UserError(f"{checkpoint.directory}: its state's adapter is {values!r}, which is no object; it is damaged")
    return PeftSettings(values, checkpoint.directory / INDEX)


def peft_config(spec: AdapterSpec, shape: ModelShape, base: str) -> dict[str, Any]:
    """The content of adapter_config.json.

    `target_modules` names modules by their last parts where these mean the spec's modules and no others, else in full.

    Args:
        base: the directory or name of the model.
    """
    short = sorted({module.rpartition(".")[2] for module in spec.modules})
    is_all = matching(short, None, shape, spec.modules_to_save) == spec.modules
    saved: list[str] = list(spec.modules_to_save)
    if shape.head == "reward":  # the names that PEFT itself adds for a sequence classifier
        saved = [*(name for name in saved if name != "score"), "classifier", "score"]
    return {
        "alpha_pattern": {module: _plain(alpha) for module, alpha in spec.alphas.items()},
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "ensure_weight_tying": shape.tied_embeddings and "model.embed_tokens" in spec.modules_to_save,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": spec.init if spec.init in DECOMPOSED else True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _plain(spec.alpha),
        "lora_dropout": spec.dropout,
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": dict(spec.ranks),
        "revision": None,
        "target_modules": short if is_all else list(spec.modules),
        "task_type": "SEQ_CLS" if shape.head == "reward" else "CAUSAL_LM",
        "use_dora": spec.use_dora,
        "use_rslora": spec.use_rslora,
    }


def why_peft_cannot(spec: AdapterSpec, shape: ModelShape) -> str | None:
    """Why PEFT (0.21, with transformers 5) does not load such an adapter as it is; None where it does.

    Since transformers 5 has the matrices of all experts in one, PEFT joins their adapters, which it does for plain LoRA of
    one rank that gate and up both have, and leaves other modules of the same names (of dense layers and shared experts)
    out. Without adapters of experts it takes these names for experts', too. Experts that are one tensor in the files as well
    it leaves alone.
    """
    if shape.experts is None or shape.experts.fused is not None:
        return None
    names = {"gate": shape.experts.gate, "up": shape.experts.up, "down": shape.experts.down}
    of_experts = {kind for kind, name in names.items() for m in spec.modules if ".experts." in m and m.endswith(f".{name}")}
    dense = [m for m in spec.modules if ".experts." not in m and m.rpartition(".")[2] in names.values()]
    if not of_experts:
        return f"it takes dense matrices of the experts' names ({dense[0]}) for experts" if dense else None
    if ("gate" in of_experts) is not ("up" in of_experts):
        return f"of experts it takes adapters of {shape.experts.gate} and {shape.experts.up} together only"
    if spec.use_dora or spec.use_rslora or spec.ranks or spec.alphas:
        return "of experts it takes plain LoRA of one rank and alpha only"
    if dense:
        return f"beside experts it leaves out adapters of dense layers' matrices of the same names ({dense[0]})"
    return None


def adapter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type that a trained tensor is written in: the model's, but float32 of DoRA's magnitudes."""
    return torch.float32 if name.endswith(MAGNITUDE) else dtype


def _plain(number: float) -> int | float:
    return int(number) if number == int(number) else number


def write_peft(
    directory: Path,
    spec: AdapterSpec,
    shape: ModelShape,
    tensors: Mapping[str, Tensor],
    base: str,
    companions: Companions,
    base_digest: str | None = None,
) -> None:
    """Write an adapter as a PEFT directory, after `staging.begin`, and give the directory its name.

    Args:
        tensors: those of `adapter_shapes`, in host memory, in the types that they are written in.
        base: the model that it belongs to.
        companions: of the model; the tokenizer is written beside the adapter, its config.json is not.
        base_digest: of the base's files, kept in the file's metadata.

    Raises:
        ValueError: the tensors are not those of the adapter.
        UserError: the disk refuses.
    """
    expected, partial = adapter_shapes(shape, spec), staging(directory)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        name = sorted(found.items() ^ expected.items())[0][0]
        raise ValueError(f"tensor {name} is not what the adapter has: {found.get(name)}, not {expected.get(name)}")
    if shape.tied_embeddings and EMBEDDING in tensors:  # PEFT looks for either
        tensors = {**tensors, HEAD: tensors[EMBEDDING]}
    metadata = {} if base_digest is None else {BASE_DIGEST: base_digest}
    write_tensor_file({PREFIX + name: tensor for name, tensor in tensors.items()}, partial / WEIGHTS_NAME, metadata)
    write_json(partial / CONFIG_NAME, peft_config(spec, shape, base))
    write_companions(companions, partial)
    publish(directory)
