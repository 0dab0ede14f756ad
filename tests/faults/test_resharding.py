"""A checkpoint of any layout goes on in any other, on four processes: what is loaded is, bit for bit, what was in memory
when it was saved, and the step after that is the one that the first layout takes.

Every rank keeps what it had of weights, both moments and the parameters that the model computes with when a checkpoint was
saved, each number with its place among those of all logical tensors; after a load in another layout, every rank compares
each number that it now has. The position (step, tokens seen, the groups of all steps to come) and the state of the random
generator are compared as well.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.runs import exported_weights, read_metrics, run_settings, save_files, train_each, weights_in
from tests.helpers.worlds import run_world

DEEPSPEED = {"engine": "deepspeed"}
DENSE: dict[str, dict[str, Any]] = {
    "data 4": {},
    "tensor 2 x pipeline 2": {"tensor": 2, "pipeline": 2},
    "ZeRO-3 data 4": DEEPSPEED | {"zero_stage": 3},
    "pipeline 2 of 2 chunks x data 2": {"pipeline": 2, "virtual_pipeline": 2},
    "ZeRO-1 tensor 2 x data 2": DEEPSPEED | {"zero_stage": 1, "tensor": 2},
    "tensor 2 x context 2": {"tensor": 2, "context": 2},
    "ZeRO-2 pipeline 2 x data 2": DEEPSPEED | {"zero_stage": 2, "pipeline": 2},
    "pipeline 2 of 1 and 3 layers x context 2": {"pipeline": 2, "pipeline_layout": "1,3", "context": 2},
    "tensor 4": {"tensor": 4},
    "ZeRO-0 data 4": DEEPSPEED | {"zero_stage": 0},
    "pipeline 4": {"pipeline": 4},
    "tensor 2 x data 2, overlapping": {"tensor": 2, "overlap": True},
    "context 4": {"context": 4},
    "ZeRO-2 data 4": DEEPSPEED | {"zero_stage": 2},
    "ZeRO-3 tensor 2 x data 2": DEEPSPEED | {"zero_stage": 3, "tensor": 2},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "data 4": {},
    "tensor 2, experts over 2 of tensor 2": {"tensor": 2, "expert": 2, "expert_tensor": 2},
    "pipeline 2, experts over 2": {"pipeline": 2, "expert": 2},
    "experts over 4": {"expert": 4},
    "tensor 2 x pipeline 2": {"tensor": 2, "pipeline": 2},
    "tensor 2, experts over 4": {"tensor": 2, "expert": 4},
    "tensor 2 x pipeline 2, experts over 2": {"tensor": 2, "pipeline": 2, "expert": 2},
    "context 2, experts over 4": {"context": 2, "expert": 4},
}
MODELS = {"dense": DENSE, "experts": EXPERTS}
RINGS = {"dense": list(DENSE)[:6], "experts": list(EXPERTS)[:3]}
"""The fast part: a run that goes through these layouts, a step in each, and back to the first: 9 ordered pairs."""

KINDS = ("weights", "exp_avg", "exp_avg_sq", "model")
"""The last: the parameters that the model computes with, on every replica; here in fp32, so that they are the weights."""

Numbers = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Kind -> places (int64) among the numbers of all logical tensors, and the bits (int32) of the numbers there."""


@dataclass(frozen=True)
class Leg:
    """A run, or the part of one that is in one layout.

    Attributes:
        origin: the output directory and step of the checkpoint that it goes on from; None: it begins.
        last_step: where it breaks off, once that is saved; None: it does not.
    """

    settings: dict[str, Any]
    origin: tuple[Path, int] | None = None
    last_step: int | None = None


class _BrokenOff(Exception):
    """On every rank at once, so that these processes can go on to the next leg."""


@dataclass
class Loaded:
    """What a rank has found after it has loaded a checkpoint.

    Attributes:
        here: bool, by kind, of each number whether this rank has it.
        num_different: by kind, of those that it has, how many are not what was saved.
        is_whole: whether the ranks that saved had every number, and copies of one were the same.
        position, saved_position: of this rank now; of rank 0 when it was saved.
    """

    here: dict[str, torch.Tensor]
    num_different: dict[str, int]
    is_whole: bool
    position: dict[str, Any]
    saved_position: dict[str, Any]


def memory_of(output_dir: Path, step: int, rank: int) -> Path:
    """Where a rank keeps what it had when a step was saved."""
    return output_dir.parent / "memory" / f"{output_dir.name} {step} {rank}.pt"


def numbers_of(run: Any) -> tuple[Numbers, int]:
    """All that this rank itself has of the state, and how many numbers all logical tensors have."""
    from megadpo.model.families import logical_shapes

    shapes = logical_shapes(run.setup.policy.shape)
    sizes = [math.prod(shape) for shape in shapes.values()]
    firsts = dict(zip(shapes, itertools.accumulate(sizes, initial=0), strict=False))

    @functools.cache
    def places_of(shard: Any) -> torch.Tensor:
        """int64, of each number of a shard its place; -1: padding."""
        places = torch.full(shard.shape, -1)
        for piece in shard.pieces:
            name, dim, length = piece.logical_name, piece.dim, piece.length
            logical = firsts[name] + torch.arange(math.prod(shapes[name])).view(shapes[name])
            places.narrow(dim, piece.local_start, length).copy_(logical.narrow(dim, piece.logical_start, length))
        return places.view(-1)

    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {kind: [] for kind in KINDS}
    for kind, shard, first, values in run.engine.own_state():
        found[kind].append((places_of(shard)[first : first + values.numel()], values.detach().view(-1)))
    for name, values in run.engine.parameters():
        found["model"].append((places_of(run.engine.stage.parameters[name][1]), values.detach().reshape(-1)))
    numbers = {}
    for kind, parts in found.items():
        places, values = (
            (torch.cat(each) for each in zip(*parts, strict=True))
            if parts
            else (torch.zeros(0, dtype=torch.int64), torch.zeros(0))
        )
        assert values.dtype is torch.float32
        numbers[kind] = places[places >= 0], values[places >= 0].view(torch.int32)
    return numbers, sum(sizes)


def position_of(run: Any, step: int) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": run.num_tokens_seen,
        "groups to come": [run.setup.sampler.group_ids(later).tolist() for later in range(step, run.setup.num_steps)],
        "metrics": {name: value for name, value in run.metrics.items() if name in ("loss", "grad_norm", "num_tokens")},
        "random state": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
    }


def _gone(legs: list[Leg]) -> list[Loaded | None]:
    """Each leg in turn; of those that have an origin, what this rank has found."""
    import os
    from unittest import mock

    import megadpo
    from megadpo.training import run_state, trainer

    save, resume, save_where_due, rank = run_state.save, run_state.resume, trainer.save_where_due, int(os.environ["RANK"])
    found: list[Loaded | None] = []

    def keep_and_save(run: Any, step: int) -> Any:
        path = memory_of(run.setup.output_dir, step, rank)
        path.parent.mkdir(exist_ok=True)
        torch.save({"numbers": numbers_of(run)[0], "position": position_of(run, step)}, path)
        return save(run, step)

    def resume_and_compare(run: Any) -> int:
        step = resume(run)
        assert leg.origin is not None
        kept = [torch.load(memory_of(*leg.origin, number), weights_only=True) for number in range(4)]
        here, num_numbers = numbers_of(run)
        masks, num_different, is_whole = {}, {}, True
        for kind, (places, bits) in here.items():
            whole, is_there = torch.zeros(num_numbers, dtype=torch.int32), torch.zeros(num_numbers, dtype=torch.bool)
            for saved_places, saved_bits in (each["numbers"][kind] for each in kept):
                again = is_there[saved_places]
                is_whole &= torch.equal(whole[saved_places][again], saved_bits[again])
                whole[saved_places], is_there[saved_places] = saved_bits, True
            is_whole &= bool(is_there.all())
            num_different[kind] = int((whole[places] != bits).sum())
            masks[kind] = torch.zeros(num_numbers, dtype=torch.bool)
            masks[kind][places] = True
        found[-1] = Loaded(masks, num_different, is_whole, position_of(run, step), kept[0]["position"])
        return step

    def save_and_break_off(run: Any, done: int, *ends: bool) -> bool:
        is_saved = save_where_due(run, done, *ends)
        if done == leg.last_step:
            run.saver.finish()
            raise _BrokenOff
        return is_saved

    with (
        mock.patch.object(run_state, "save", keep_and_save),
        mock.patch.object(run_state, "resume", resume_and_compare),
        mock.patch.object(trainer, "save_where_due", save_and_break_off),
    ):
        for leg in legs:
            found.append(None)
            with contextlib.suppress(_BrokenOff):
                megadpo.train(leg.settings)
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tied model of four layers, and one of two whose second has four experts."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is an extra of its own")
    root = tmp_path_factory.mktemp("files")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 4}
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [0],
        "head_dim": 8,
    }
    return {
        "dense": save_files(root / "dense", "llama", 40, num_hidden_layers=4, tie_word_embeddings=True, **sizes),
        "experts": save_files(root / "experts", "qwen3_moe", 40, num_hidden_layers=2, **sizes, **experts),
    }


def settings_of(files: Path, output_dir: Path, parallel: dict[str, Any], steps: int, **checkpoint: Any) -> dict[str, Any]:
    """What costs time and is not asked about here is left out: a reference, the watchdog, saves behind the loop."""
    train = {"steps": steps, "pairs_per_step": 4, "tokens_per_micro_batch": 256, "warmup_steps": 0, "hang_timeout": 0}
    return run_settings(
        files,
        output_dir,
        data={"max_length": 48},
        objective={"loss_type": "simpo", "beta": 2.0},
        reference={"mode": "none"},
        parallel=parallel,
        train=train,
        checkpoint={"at_end": False, "asynchronous": False, **checkpoint},
    )


def assert_loaded(of_ranks: list[Loaded], model: Path, about: str) -> None:
    """What is loaded on four ranks is what was saved, and all of the model."""
    num_numbers = sum(values.numel() for values in weights_in(model).values())
    for loaded in of_ranks:
        assert loaded.is_whole and loaded.num_different == dict.fromkeys(KINDS, 0), about
        assert loaded.position == loaded.saved_position, about
    for kind in KINDS:
        is_there = torch.stack([loaded.here[kind] for loaded in of_ranks]).any(0)
        assert len(is_there) == num_numbers and bool(is_there.all()), (about, kind)


def assert_same_step(record: dict[str, float], expected: dict[str, float], about: str) -> None:
    """Within what rounding differs by between two layouts: the bound of every layout in tests/parity."""
    assert record.keys() == expected.keys()
    assert record["loss"] == pytest.approx(expected["loss"], rel=1e-6), about
    assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5), about
    for exact in ("step", "num_tokens", "epoch", "learning_rate"):
        assert record[exact] == expected[exact], (about, exact)


def assert_close_weights(output_dir: Path, other: Path, about: str) -> None:
    """The exported models of two layouts."""
    ours, theirs = exported_weights(output_dir), exported_weights(other)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert torch.allclose(ours[name], values, rtol=1e-4, atol=1e-5), (about, name)


@pytest.mark.slow
def test_a_run_goes_through_nine_layouts_a_step_in_each(files: dict[str, Path], tmp_path: Path) -> None:
    """And each step is that of the run that stays on one process."""
    alone = [settings_of(files[model], tmp_path / model / "alone", {}, len(ring) + 1) for model, ring in RINGS.items()]
    legs: list[Leg] = []
    for model, ring in RINGS.items():
        steps, before = len(ring) + 1, None
        for step, name in enumerate([*ring, ring[0]], 1):
            output_dir = tmp_path / model / f"{step} {name}"
            resume = "auto" if before is None else str(before / "checkpoints" / f"step_{step - 1:08d}")
            settings = settings_of(files[model], output_dir, MODELS[model][name], steps, every=1, resume=resume)
            legs.append(Leg(settings, before and (before, step - 1), step if step < steps else None))
            before = output_dir
    expected = run_world(1, train_each, alone)[0]
    found = zip(legs, zip(*run_world(4, _gone, legs), strict=True), strict=True)
    for model, ring, records in zip(MODELS, RINGS.values(), expected, strict=True):
        for record in records:
            leg, of_ranks = next(found)
            about = f"{model}, to {leg.settings['parallel']}"
            if leg.origin is not None:
                assert_loaded(list(of_ranks), files[model] / "model", about)
            (ours,) = read_metrics(Path(leg.settings["output_dir"]))
            assert_same_step(ours, record, about)
        assert len(records) == len(ring) + 1 and leg.settings["parallel"] == MODELS[model][ring[0]]
        assert_close_weights(Path(leg.settings["output_dir"]), tmp_path / model / "alone", model)


def pairs_from(model: str, first: str, files: Path, root: Path) -> tuple[list[str], list[Leg]]:
    """The other layouts, and the legs: two steps in the first layout, of which the first is saved, and each other layout's
    second step from there."""
    others = [name for name in MODELS[model] if name != first]
    legs = [Leg(settings_of(files, root / first, MODELS[model][first], 2, every=1))]
    resume = str(root / first / "checkpoints" / "step_00000001")
    for name in others:
        legs.append(Leg(settings_of(files, root / name, MODELS[model][name], 2, resume=resume), (root / first, 1)))
    return others, legs


@pytest.mark.exhaustive
@pytest.mark.parametrize(("model", "first"), [(model, name) for model in MODELS for name in MODELS[model]])
def test_what_one_layout_saved_every_other_one_loads_to_the_bit(
    model: str, first: str, files: dict[str, Path], tmp_path: Path
) -> None:
    others, legs = pairs_from(model, first, files[model], tmp_path)
    of_ranks = run_world(4, _gone, legs)
    expected = read_metrics(tmp_path / first)[1]
    for number, name in enumerate(others, 1):
        about = f"{first} -> {name}"
        assert_loaded([found[number] for found in of_ranks], files[model] / "model", about)
        assert_same_step(read_metrics(tmp_path / name)[0], expected, about)
        assert_close_weights(tmp_path / name, tmp_path / first, about)


def test_there_are_more_than_the_132_ordered_pairs_of_12_layouts() -> None:
    assert len(DENSE) >= 12 and sum(len(layouts) * (len(layouts) - 1) for layouts in MODELS.values()) == 266
    assert sum(map(len, RINGS.values())) == 9 and all(ring == list(dict.fromkeys(ring)) for ring in RINGS.values())
