"""Damaged checkpoints: whatever happened to their bytes is found before anything is loaded, named, and not trained on.

A run is saved at steps 2, 4 and 6 by two tensor ranks. Each attack damages a copy of it in one of the ways below, drawn from
its number, and asks the functions that the trainer asks where the run would go on (training/resume.py): from the newest
checkpoint that is intact, with the damaged ones named; and where the damaged one is asked for by its path, in one sentence
that names the newest intact one. A few whole runs then go on so, to the bits of the run that nothing happened to.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megadpo.checkpoint.sharded import open_checkpoint
from megadpo.errors import UserError
from megadpo.files import ALGORITHM, SEAL, is_sealed, sealed
from megadpo.training.resume import Origin, Search, find_checkpoint, settle_checkpoint
from megadpo.training.setup import prepare
from megadpo.validation.load import load_config
from tests.helpers.runs import assert_same_weights, run_settings, save_files, train_run
from tests.helpers.worlds import run_world

STEPS = (2, 4, 6)
NUM_FAST, NUM_ALL = 60, 500
WITHOUT_WARM_UP = {"pairs_per_step": 4, "tokens_per_micro_batch": 256, "warmup_steps": 0}


def step(number: int) -> str:
    return f"step_{number:08d}"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    return save_files(directory, "qwen3", 24, num_hidden_layers=2, hidden_size=32, intermediate_size=48)


def settings_of(files: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """A run of 8 steps that is saved every 2."""
    sections = {"train": {"steps": 8, **WITHOUT_WARM_UP}, "checkpoint": {"every": 2, "keep": 3}, **changes}
    return run_settings(files, output_dir, **sections)


@pytest.fixture(scope="module")
def broken_off(files, tmp_path_factory) -> Path:
    """The run after step 7, killed: checkpoints of steps 2, 4 and 6, each in the files of two tensor ranks."""
    output_dir = tmp_path_factory.mktemp("runs") / "run"
    run_world(2, train_run, settings_of(files, output_dir, parallel={"tensor": 2}), 7)
    assert sorted(path.name for path in (output_dir / "checkpoints").iterdir()) == [step(number) for number in STEPS]
    return output_dir


@pytest.fixture(scope="module")
def search(files, broken_off) -> Search:
    """What the trainer would search by, on that run; tests give it copies to search in."""
    return prepare(load_config(settings_of(files, broken_off))).search


def copied(run: Path, to: Path) -> Path:
    """The checkpoints of a run, as links: `write` below puts new files in their place."""
    shutil.copytree(run / "checkpoints", to, copy_function=os.link)
    return to


def write(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def where(search: Search) -> Origin:
    """Where the trainer would go on."""
    return settle_checkpoint(search, find_checkpoint(search))


# The ways in which a checkpoint comes to harm: each is given the newest one, and returns what the sentence has to name.
Attack = Callable[[Path, random.Random], str]


def any_file(checkpoint: Path, draw: random.Random, pattern: str = "*") -> Path:
    found = sorted(path for path in checkpoint.rglob(pattern) if path.is_file() and path.stat().st_size > 1)
    return draw.choice(found)


def flip_a_bit(checkpoint: Path, draw: random.Random) -> str:
    path = any_file(checkpoint, draw)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    write(path, bytes(content))
    return path.name


def overwrite_a_block(checkpoint: Path, draw: random.Random) -> str:
    path = any_file(checkpoint, draw)
    before = path.read_bytes()
    for _ in range(100):  # a block of zeros may be zeros already
        content = bytearray(before)
        start = draw.randrange(len(content)) // 4096 * 4096
        length = min(4096, len(content) - start)
        content[start : start + length] = draw.choice([bytes(length), draw.randbytes(length)])
        if content != before:
            break
    assert content != before
    write(path, bytes(content))
    return path.name


def truncate(checkpoint: Path, draw: random.Random) -> str:
    path = any_file(checkpoint, draw)
    content = path.read_bytes()
    write(path, content[: draw.choice([0, len(content) // 2, len(content) - 1, draw.randrange(len(content))])])
    return path.name


def lengthen(checkpoint: Path, draw: random.Random) -> str:
    path = any_file(checkpoint, draw)
    write(path, path.read_bytes() + draw.choice([b"\0", b"\n", b" ", draw.randbytes(4096)]))
    return path.name


def put_back_an_older_file(checkpoint: Path, draw: random.Random) -> str:
    """As a disk that lost its last writes: the file of an earlier step under the same name."""
    path = any_file(checkpoint, draw, "pp*.safetensors")
    write(path, (checkpoint.with_name(step(draw.choice(STEPS[:2]))) / path.name).read_bytes())
    return path.name


def exchange_two_files(checkpoint: Path, draw: random.Random) -> str:
    first, second = sorted(checkpoint.glob("pp*.safetensors"))[:2]
    contents = first.read_bytes(), second.read_bytes()
    write(first, contents[1])
    write(second, contents[0])
    return first.name


def take_the_index_of_another_step(checkpoint: Path, draw: random.Random) -> str:
    other = checkpoint.with_name(step(draw.choice(STEPS[:2])))
    write(checkpoint / "checkpoint.json", (other / "checkpoint.json").read_bytes())
    return checkpoint.name


def take_all_of_another_step(checkpoint: Path, draw: random.Random) -> str:
    """Every file is intact, and the whole is of another step than its name says."""
    other = checkpoint.with_name(step(draw.choice(STEPS[:2])))
    shutil.rmtree(checkpoint)
    shutil.copytree(other, checkpoint)
    return checkpoint.name


def remove_a_file(checkpoint: Path, draw: random.Random) -> str:
    path = any_file(checkpoint, draw)
    path.unlink()
    return path.name


def put_something_else_in_a_files_place(checkpoint: Path, draw: random.Random) -> str:
    path = any_file(checkpoint, draw)
    path.unlink()
    if draw.random() < 0.5:
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    return path.name


EDITS: list[Callable[[dict[str, Any]], Any]] = [
    lambda index: index["state"].update(step=5),
    lambda index: index["state"].update(num_tokens=1),
    lambda index: index["state"].update(data_digest="0" * 40),
    lambda index: index["state"].update(rng=index["state"]["rng"][::-1]),
    lambda index: index["state"]["metrics"].update(loss=0.0),
    lambda index: index.update(state={}),
    lambda index: index["tensors"].pop("exp_avg_sq"),
    lambda index: index["tensors"]["weights"].pop(GATE),
    lambda index: exchange(index["tensors"]["weights"], GATE, UP),
    lambda index: exchange(index["tensors"], "exp_avg", "exp_avg_sq"),
    lambda index: index["files"].pop(next(iter(index["files"]))),
    lambda index: index.pop("files"),
    lambda index: index.pop(ALGORITHM),
    lambda index: index.update(version=1),
]
GATE, UP = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"


def exchange(entries: dict[str, Any], first: str, second: str) -> None:
    entries[first], entries[second] = entries[second], entries[first]


def edit_the_index(checkpoint: Path, draw: random.Random) -> str:
    """By hand, so that its hash is no longer its own."""
    index = json.loads((checkpoint / "checkpoint.json").read_bytes())
    draw.choice(EDITS)(index)
    write(checkpoint / "checkpoint.json", json.dumps(index).encode() + b"\n")
    return "checkpoint.json"


WRONG = (None, True, -1, 2.5, "6", "", [], {}, [1], {"a": "b"}, 10**30, float("nan"), [1.0, 0.5], ["a", "b"])
FIELDS = ("step", "num_steps", "num_tokens", "metrics", "data_digest", "rng")


def spoil_a_field_of_the_state(checkpoint: Path, draw: random.Random) -> str:
    """And write the index anew with its right hash: a field is missing, or not what it must be."""
    index = json.loads((checkpoint / "checkpoint.json").read_bytes())
    del index[ALGORITHM]
    state, name = index["state"], draw.choice((*FIELDS, "delta"))
    fitting = {"metrics": ({},), "data_digest": ("6", "")}.get(name, ())
    wrong = draw.choice([value for value in WRONG if value not in fitting and value == value])  # JSON has no nan
    if name != "delta" and draw.random() < 0.4:
        del state[name]
    else:
        state[name] = wrong
    write(checkpoint / "checkpoint.json", sealed(index))
    return checkpoint.name


def lose_a_tensor(checkpoint: Path, draw: random.Random) -> str:
    """And write the index anew with its right hash."""
    index = json.loads((checkpoint / "checkpoint.json").read_bytes())
    del index[ALGORITHM]
    kind = draw.choice(["weights", "exp_avg", "exp_avg_sq"])
    if draw.random() < 0.3:
        del index["tensors"][kind]
    else:
        del index["tensors"][kind][draw.choice(sorted(index["tensors"][kind]))]
    write(checkpoint / "checkpoint.json", sealed(index))
    return checkpoint.name


ATTACKS: tuple[Attack, ...] = (
    flip_a_bit,
    overwrite_a_block,
    truncate,
    lengthen,
    put_back_an_older_file,
    exchange_two_files,
    take_the_index_of_another_step,
    take_all_of_another_step,
    remove_a_file,
    put_something_else_in_a_files_place,
    edit_the_index,
    spoil_a_field_of_the_state,
    lose_a_tensor,
)


def attack(number: int, run: Path, root: Path, search: Search) -> None:
    """Damage the newest checkpoint of a copy, every fifth time the one before it as well, and see what is said and taken."""
    draw, kind = random.Random(number), ATTACKS[number % len(ATTACKS)]
    copied(run, root)
    names = [kind(root / step(6), draw)]
    intact = root / step(4)
    if number % 5 == 0:
        names.append(draw.choice([flip_a_bit, overwrite_a_block, truncate, edit_the_index])(root / step(4), draw))
        intact = root / step(2)
    about = f"attack {number}, {kind.__name__}: {names}"
    origin = where(replace(search, root=root))
    assert origin.checkpoint == intact, about
    assert len(origin.left_out) == len(names), about
    for name, newest, sentence in zip(names, (6, 4), origin.left_out, strict=False):
        assert name in sentence and step(newest) in sentence and "\n" not in sentence, (about, sentence)
    with pytest.raises(UserError, match=r"checkpoint\.resume") as refused:
        where(replace(search, root=root, chosen=root / step(6)))
    assert names[0] in str(refused.value) and f"checkpoint.resume={intact}" in str(refused.value), about


def attacks(numbers: range, run: Path, directory: Path, search: Search) -> None:
    for number in numbers:
        attack(number, run, directory / str(number), search)
        shutil.rmtree(directory / str(number))


@pytest.mark.slow
def test_damage_is_found_and_named_and_the_newest_intact_checkpoint_is_taken(broken_off, search, tmp_path):
    attacks(range(NUM_FAST), broken_off, tmp_path, search)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_five_hundred_damaged_checkpoints_are_all_found(broken_off, search, tmp_path):
    attacks(range(NUM_FAST, NUM_FAST + NUM_ALL), broken_off, tmp_path, search)


@pytest.mark.parametrize("edit", range(len(EDITS)))
def test_every_edit_of_the_index_is_found(edit, broken_off, search, tmp_path):
    root = copied(broken_off, tmp_path / "copy")
    index = json.loads((root / step(6) / "checkpoint.json").read_bytes())
    EDITS[edit](index)
    write(root / step(6) / "checkpoint.json", json.dumps(index).encode() + b"\n")
    origin = where(replace(search, root=root))
    assert origin.checkpoint == root / step(4) and "checkpoint.json" in origin.left_out[0]


def test_an_undamaged_run_goes_on_from_its_newest_checkpoint(broken_off, search, tmp_path):
    root = copied(broken_off, tmp_path / "copy")
    assert where(replace(search, root=root)) == Origin(root / step(6))
    assert where(replace(search, root=root, chosen=root / step(2))) == Origin(root / step(2))


def test_where_no_checkpoint_is_intact_the_run_does_not_begin_anew_in_silence(broken_off, search, tmp_path):
    root = copied(broken_off, tmp_path / "copy")
    for number in STEPS:
        (root / step(number) / "checkpoint.json").unlink()
    with pytest.raises(UserError, match=r"holds 3 checkpoints.*has no checkpoint\.json.*checkpoint\.resume=never"):
        where(replace(search, root=root))


def test_a_directory_that_only_looks_like_a_newer_checkpoint_is_not_taken(broken_off, search, tmp_path):
    root = copied(broken_off, tmp_path / "copy")
    (root / "step_99999999").mkdir()
    origin = where(replace(search, root=root))
    assert origin.checkpoint == root / step(6)
    assert len(origin.left_out) == 1 and "step_99999999" in origin.left_out[0]
    (tmp_path / "empty" / step(2)).mkdir(parents=True)
    assert where(replace(search, root=tmp_path / "empty")).checkpoint is None, "nothing was lost there"


def test_damage_is_loaded_only_where_that_is_asked_for(broken_off, search, tmp_path):
    root = copied(broken_off, tmp_path / "copy")
    path = any_file(root / step(6), random.Random(0), "pp*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    write(path, bytes(content))
    assert where(replace(search, root=root, verify=False)).checkpoint == root / step(6)
    assert where(replace(search, root=root)).checkpoint == root / step(4)


def test_a_checkpoint_of_older_code_has_no_hashes_and_is_taken(broken_off, search, tmp_path):
    root = copied(broken_off, tmp_path / "copy")
    index = json.loads((root / step(6) / "checkpoint.json").read_bytes())
    del index[ALGORITHM], index["files"]
    index["version"] = 1
    write(root / step(6) / "checkpoint.json", json.dumps(index).encode())
    origin = where(replace(search, root=root))
    assert origin == Origin(root / step(6)) and open_checkpoint(root / step(6)).files is None


def test_every_byte_of_the_index_is_covered_by_its_hash():
    text = sealed({"format": "x", "state": {"step": 1}})
    assert is_sealed(text) and text.startswith(SEAL) and json.loads(text)["state"] == {"step": 1}
    for place in range(len(text)):
        for bit in range(8):
            changed = bytearray(text)
            changed[place] ^= 1 << bit
            assert not is_sealed(bytes(changed)), (place, bit)


# Whole runs: the damage that shared/cases/16 and 33 describe.
CASES = {
    "half": lambda path: write(path, path.read_bytes()[: path.stat().st_size // 2]),
    "zero": lambda path: write(path, b""),
    "header": lambda path: write(path, b"\xff" * 8 + path.read_bytes()[8:]),
    "flip": lambda path: write(path, (data := path.read_bytes())[:-100] + bytes([data[-100] ^ 64]) + data[-99:]),
    "gone": lambda path: path.unlink(),
    "json": lambda path: write(path.parent / "checkpoint.json", (path.parent / "checkpoint.json").read_bytes()[:20]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_cut_short_is_named_and_the_one_before_it_taken(case, broken_off, search, tmp_path):
    root = copied(broken_off, tmp_path / "copy")
    largest = max((root / step(6)).glob("*.safetensors"), key=lambda path: path.stat().st_size)
    CASES[case](largest)
    origin = where(replace(search, root=root))
    assert origin.checkpoint == root / step(4)
    assert ("checkpoint.json" if case == "json" else largest.name) in origin.left_out[0]


def _settled_on_every_rank(search: Search) -> Origin:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        return settle_checkpoint(search, find_checkpoint(search))
    finally:
        dist.destroy_process_group()


def test_all_ranks_decide_alike_though_each_hashes_files_of_its_own(broken_off, search, tmp_path):
    root = copied(broken_off, tmp_path / "copy")
    for number, rank in ((6, 0), (4, 1)):
        path = root / step(number) / f"pp00-tp{rank:02d}-000.safetensors"
        content = bytearray(path.read_bytes())
        content[-5] ^= 4
        write(path, bytes(content))
    origins = run_world(3, _settled_on_every_rank, replace(search, root=root))
    assert origins[0] == origins[1] == origins[2]
    assert origins[0].checkpoint == root / step(2)
    assert "tp00" in origins[0].left_out[0] and "tp01" in origins[0].left_out[1]


def _heard(settings: dict[str, Any]) -> tuple[list[dict[str, float]] | str, str]:
    """A run's metrics, or the sentence that refuses it; and what it says on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            return train_run(settings), said.getvalue()
        except UserError as error:
            return str(error), said.getvalue()


def _each_heard(runs: list[dict[str, Any]]) -> list[tuple[list[dict[str, float]] | str, str]]:
    return [_heard(settings) for settings in runs]


@pytest.mark.slow
def test_whole_runs_go_on_from_the_newest_intact_checkpoint_to_the_same_bits(files, broken_off, tmp_path):
    """On two ranks: with the damaged one asked for, with the newest damaged, and without any checkpoint."""
    parallel = {"parallel": {"tensor": 2}}
    shutil.copytree(broken_off, tmp_path / "damaged")
    damaged = tmp_path / "damaged" / "checkpoints" / step(6)
    content = bytearray((damaged / "pp00-tp01-000.safetensors").read_bytes())
    content[-100] ^= 64
    write(damaged / "pp00-tp01-000.safetensors", bytes(content))
    asked = {"every": 2, "keep": 3, "resume": str(damaged)}
    runs = [
        settings_of(files, tmp_path / "damaged", **parallel, checkpoint=asked),
        settings_of(files, tmp_path / "damaged", **parallel),
        settings_of(files, tmp_path / "whole", **parallel),
    ]
    refused, gone_on, whole = run_world(2, _each_heard, runs)[0]
    assert "pp00-tp01-000.safetensors is damaged" in refused[0] and f"{step(4)}" in refused[0]
    assert gone_on[0] == whole[0] and len(whole[0]) == 8
    assert gone_on[1].count("a checkpoint is left out") == 1 and "pp00-tp01-000.safetensors is damaged" in gone_on[1]
    assert f"resuming from {damaged.with_name(step(4))}" in gone_on[1]
    assert_same_weights(tmp_path / "damaged", tmp_path / "whole")
    assert (damaged.parent / "aside-0" / step(6)).is_dir() or list(damaged.parent.glob(f"aside-*/{step(6)}"))


def test_a_path_that_is_no_checkpoint_is_refused_at_once_with_the_newest_one_named(files, broken_off):
    settings = settings_of(files, broken_off, checkpoint={"every": 2, "resume": str(broken_off / "checkpoints" / step(5))})
    with pytest.raises(UserError, match=rf"step_00000005 is not a checkpoint.*the newest one is .*{step(6)}"):
        prepare(load_config(settings))


def test_a_random_state_of_another_kind_is_refused(broken_off, search, tmp_path):
    root = copied(broken_off, tmp_path / "copy")
    index = json.loads((root / step(6) / "checkpoint.json").read_bytes())
    del index[ALGORITHM]
    index["state"]["rng"] = base64.b64encode(b"\xff" * 5056).decode()
    write(root / step(6) / "checkpoint.json", sealed(index))
    assert "rng" in where(replace(search, root=root)).left_out[0]
