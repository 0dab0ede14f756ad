"""Runs whose memory is measured and reckoned: small models on 1 to 4 gloo processes, as docs/plan.md lists them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.material import made_up_file, synthetic_groups
from megadpo.checkpoint.hf import read_hf_config
from megadpo.data.groups import Group
from megadpo.data.store import GroupStore
from megadpo.model.adapters.spec import resolve
from megadpo.model.families import shape_of
from megadpo.model.shape import head_work
from megadpo.planning.memory import RankMemory, rank_memory
from megadpo.planning.search import plan_of
from megadpo.planning.workload import Workload
from megadpo.validation.load import load_config
from tests.helpers.models import save_model
from tests.helpers.tensor_bytes import Held, held_on_this_rank
from tests.helpers.worlds import run_world

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2000,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},
    "llama": {},
    "qwen3_moe": {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 192},
}
PAIRS_PER_STEP, MEASURED_STEP = 16, 2


@dataclass(frozen=True)
class Case:
    """A run: its number of processes, its model, and what its configuration says beside the rest of them."""

    num_processes: int
    options: dict[str, Any] = field(default_factory=dict)
    family: str = "qwen3"

    def __str__(self) -> str:
        options = ", ".join(f"{name} {value}" for name, value in self.options.items()) or "nothing else"
        return f"{self.num_processes} x {self.family}, {options}"


ZERO_2 = {"parallel.engine": "deepspeed", "parallel.zero_stage": 2}
ZERO_3 = {"parallel.engine": "deepspeed", "parallel.zero_stage": 3}
BF16 = {"model.dtype": "bf16", "train.moments_dtype": "bf16", "parallel.gradient_dtype": "bf16"}
ZERO_BUBBLE = {"schedule.name": "1f1b", "schedule.zero_bubble": True}
CASES = (
    Case(1),
    Case(1, {"train.recompute": "small"}),
    Case(1, {"train.recompute": "full"}),
    Case(1, {"train.recompute": "full", "train.recompute_method": "block", "train.recompute_num_layers": 2}),
    Case(1, {"reference.mode": "precomputed"}),
    Case(1, {"adapter.kind": "lora"}),
    Case(1, BF16),
    Case(1, family="llama"),
    Case(1, family="qwen3_moe"),
    Case(2, {"parallel.tensor": 2}),
    Case(2, {"parallel.tensor": 2, "train.recompute": "full"}),
    Case(2, {"parallel.pipeline": 2}),
    Case(2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
    Case(2, {"parallel.pipeline": 2, **ZERO_BUBBLE}),
    Case(2),
    Case(2, {"parallel.context": 2}),
    Case(2, {"parallel.context": 2, "parallel.context_method": "allgather"}),
    Case(2, ZERO_2),
    Case(2, ZERO_3),
    Case(2, {"parallel.expert": 2}, "qwen3_moe"),
    Case(4, {"parallel.tensor": 2, "parallel.pipeline": 2}),
    Case(4, {"parallel.tensor": 2}),
    Case(4, {"parallel.pipeline": 2}),
    Case(4, {"parallel.pipeline": 4}),
    Case(4, {"parallel.context": 2}),
    Case(4, {"parallel.tensor": 2, **ZERO_3}),
)


def save_files(directory: Path) -> Path:
    """The models and rows that the cases name."""
    for family, sizes in FAMILIES.items():
        save_model(directory / family, family, **SIZES, **sizes)
    made_up_file(directory, 20)
    return directory


def _groups() -> list[Group]:
    return synthetic_groups("UltraFeedback-like", PAIRS_PER_STEP * (MEASURED_STEP + 2), 400, shrink=4)


def configuration(case: Case, files: Path) -> dict[str, Any]:
    """Of a case's run."""
    sections: dict[str, Any] = {
        "model": {"path": str(files / case.family), "dtype": "fp32"},
        "data": {
            "train": str(files / "made-up.jsonl"),
            "num_workers": 1,
            "max_length": 128,
            "cache_dir": str(files / "cache"),
        },
        "train": {"steps": 100, "pairs_per_step": PAIRS_PER_STEP, "tokens_per_micro_batch": 1024},
        "checkpoint": {"resume": "never"},
        "output_dir": str(files / f"run{CASES.index(case)}"),
    }
    for dotted, value in case.options.items():
        section, name = dotted.split(".")
        sections.setdefault(section, {})[name] = value
    return sections


def measured(cases: Sequence[Case], files: Path) -> list[list[Held]]:
    """[case][rank]; cases with the same number of processes share a world."""
    found: dict[int, list[Held]] = {}
    for size in sorted({case.num_processes for case in cases}):
        own = [number for number, case in enumerate(cases) if case.num_processes == size]
        configs = [configuration(cases[number], files) for number in own]
        of_ranks = run_world(size, held_on_this_rank, configs, _groups(), timeout=3000)
        found |= {number: [of_rank[place] for of_rank in of_ranks] for place, number in enumerate(own)}
    return [found[number] for number in range(len(cases))]


def reckoned(case: Case, files: Path) -> list[RankMemory]:
    """Of each rank, for the pairs of the step that is measured."""
    config = load_config(configuration(case, files))
    shape = shape_of(read_hf_config(config.model.path))
    adapter = None if config.adapter.kind == "none" else resolve(config.adapter, shape)
    plan = plan_of(config, shape, case.num_processes, adapter, on_cpu=True)
    first = MEASURED_STEP * PAIRS_PER_STEP
    store = GroupStore.of(_groups()[first : first + PAIRS_PER_STEP])
    workload = Workload.of(store, shape.hidden_size, head_work(shape), "the test's")
    layout = plan.layout
    packed = workload.packed(PAIRS_PER_STEP, layout.data, plan.capacity, layout.micro_batches_multiple_of)
    stages = [rank * layout.pipeline // case.num_processes for rank in range(case.num_processes)]
    return [rank_memory(plan, workload.mix, packed, stage) for stage in stages]
