"""How what was trained becomes the files of `hf/`: a model, a PEFT directory, or the model with its adapters added.

Each writer (one a pipeline stage) writes the files of its tensors to the directory's staging; then one process finishes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from megadpo.checkpoint.companions import Companions
from megadpo.checkpoint.export import ExportPlan, finish_export, plan_export, write_export_files
from megadpo.checkpoint.hf import SafetensorsFile
from megadpo.checkpoint.merged import MemorySource, MergedSource, UntiedSource, unties
from megadpo.checkpoint.peft import adapter_dtype, write_peft
from megadpo.checkpoint.staging import staging
from megadpo.checkpoint.tensor_file import write_tensor_file
from megadpo.model.adapters.decomposed import as_plain, plain_tensor
from megadpo.model.adapters.spec import AdapterSpec
from megadpo.model.families import TensorSource, untied

if TYPE_CHECKING:
    from megadpo.training.setup import RunSetup


class ExportFiles(Protocol):
    """Turns trained tensors into a directory."""

    def write(self, directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> object:
        """On every writer: `tensors` are those that its stage trains, whole, by logical name.

        Raises:
            UserError: a disk is full or refuses.
        """

    def finish(self, directory: Path) -> None:
        """On one process, once all have written: the directory gets its name.

        Raises:
            UserError: as `write`.
        """


def export_files(setup: RunSetup, stage: int) -> ExportFiles:
    """The kind of files that `adapter` asks for, written by pipeline stage number `stage`."""
    layout, num_layers = setup.layout, setup.policy.shape.num_layers
    if setup.adapter is not None and not setup.config.adapter.merge:
        return _AdapterFiles(setup, setup.adapter.spec, stage)
    config, frozen = setup.policy.config, setup.frozen
    if setup.adapter is not None and unties(setup.adapter.spec, setup.policy.shape):
        config, frozen = untied(config), UntiedSource(frozen)
    plan = plan_export(config, setup.dtype, layout.layers_of_chunks(num_layers))
    if setup.adapter is None:
        return _ModelFiles(plan, setup.companions)
    layers = [layer for chunk in range(layout.virtual) for layer in layout.layers_of_stage(num_layers, stage, chunk)]
    return _MergedFiles(plan, setup, frozen, setup.adapter.spec, layers, stage == 0, stage == layout.pipeline - 1)


@dataclass(frozen=True)
class _ModelFiles:
    plan: ExportPlan
    companions: Companions

    def write(self, directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> object:
        return write_export_files(self.plan, directory, tensors)

    def finish(self, directory: Path) -> None:
        finish_export(self.plan, directory, self.companions)


@dataclass(frozen=True)
class _AdapterFiles:
    """PEFT has one file: each stage writes its part, and the last process joins them."""

    setup: RunSetup
    spec: AdapterSpec
    stage: int

    def write(self, directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> object:
        own = dict(self._converted(tensors))
        return write_tensor_file(own, staging(directory) / _part(self.stage))

    def _converted(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """As they are written: of adapters that began as a part of the model, those that fit the model as it was."""
        begun = self.setup.begun
        for name, tensor in tensors:
            if begun is None:
                yield name, tensor.to("cpu", adapter_dtype(name, self.setup.dtype))
            elif name in begun.tensors:
                yield name, plain_tensor(name, tensor.cpu(), begun.tensors)
            else:
                yield name, tensor.to("cpu", self.setup.dtype)

    def finish(self, directory: Path) -> None:
        parts = [SafetensorsFile(staging(directory) / _part(stage)) for stage in range(self.setup.layout.pipeline)]
        found = {key: part.read(key, 0, 0, part.shape(key)[0]) for part in parts for key in part.keys}
        setup = self.setup
        tensors = {name: found[name] for name in setup.search.shapes if name in found}
        for part in parts:
            part.release()
            part.path.unlink()
        write_peft(
            directory,
            self.spec if setup.begun is None else as_plain(self.spec),
            setup.policy.shape,
            tensors,
            base=str(Path(setup.policy.path).resolve()),
            companions=setup.companions,
            base_digest=setup.search.inputs["model"],
        )


def _part(stage: int) -> str:
    return f"part-{stage:02d}.safetensors"


@dataclass(frozen=True)
class _MergedFiles:
    """The policy's files are read again, and the adapters added to what is read of them.

    Attributes:
        frozen: the model without adapters; of a tied one whose head an adapter makes another, with both.
        layers: of this writer's stage.
        is_first, is_last: the stage has the embedding, the head.
    """

    plan: ExportPlan
    setup: RunSetup
    frozen: TensorSource
    spec: AdapterSpec
    layers: Sequence[int]
    is_first: bool
    is_last: bool

    def write(self, directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> object:
        trained = MemorySource({name: tensor.to("cpu") for name, tensor in tensors})
        source = MergedSource(self.frozen, trained, self.spec)
        written = write_export_files(self.plan, directory, self._merged(source))
        source.release()
        return written

    def _merged(self, source: MergedSource) -> Iterator[tuple[str, Tensor]]:
        prefixes = tuple(f"model.layers.{layer}." for layer in self.layers)
        for number, (name, size) in enumerate(self.plan.shapes.items()):
            is_end = not name.startswith("model.layers.") and (self.is_first if number == 0 else self.is_last)
            if is_end or name.startswith(prefixes):
                yield name, source.read(name, 0, 0, size[0])

    def finish(self, directory: Path) -> None:
        finish_export(self.plan, directory, self.setup.companions)
