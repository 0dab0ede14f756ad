"""`reference.mode: cached`: resident in the first epoch, which fills the cache; looked up from then on."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from megadpo.errors import UserError
from megadpo.validation.load import load_config
from tests.helpers.models import save_model, write_hh
from tests.helpers.runs import resumed_and_whole, run_settings, train_each, train_run
from tests.helpers.worlds import run_world

NO_WARM_UP = {"steps": None, "epochs": 2.0, "warmup_steps": 0, "pairs_per_step": 8}
STEPS_OF_FIRST_EPOCH = 3  # of 29 usable rows; step 4 goes into the second one


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    save_model(directory / "model", "llama", num_hidden_layers=2)
    rows = write_hh(directory / "train.jsonl", 30).read_text().splitlines(keepends=True)
    (directory / "eval.jsonl").write_text("".join(rows[-6:]))
    return directory


def _of(files: Path, directory: Path, name: str, mode: str = "cached", **changes: Any) -> dict[str, Any]:
    data = {"cache_dir": str(directory / "cache"), **changes.pop("data", {})}
    return run_settings(
        files, directory / name, reference={"mode": mode}, data=data, train=changes.pop("train", NO_WARM_UP), **changes
    )


def _files_of(directory: Path) -> tuple[list[Path], list[Path]]:
    """Whole caches, and shards."""
    root = directory / "cache" / "reference"
    return sorted(root.glob("*.safetensors")), sorted(root.glob("*.parts/*.safetensors"))


def _close(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        compared = a.keys() - {"rewards/accuracies", "eval_rewards/accuracies"}  # of near ties, rounding decides
        assert a.keys() == b.keys()
        first, second = ({name: record[name] for name in compared} for record in (a, b))
        assert first == pytest.approx(second, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "aot"])
@pytest.mark.slow
def test_the_first_epoch_is_the_resident_one_s_and_the_second_agrees_to_rounding(
    files: Path, tmp_path: Path, loss: str
) -> None:
    changes: dict[str, Any] = {"objective": {"loss_type": loss}, "eval": {"every": 4}}
    changes["data"] = {"eval": str(files / "eval.jsonl")}
    both = [_of(files, tmp_path, mode, mode, **changes) for mode in ("resident", "cached")]
    resident, cached = run_world(1, train_each, both)[0]
    assert cached[:STEPS_OF_FIRST_EPOCH] == resident[:STEPS_OF_FIRST_EPOCH]
    assert cached[0]["rewards/margins"] == 0.0
    _close(cached, resident)
    whole, shards = _files_of(tmp_path)
    assert len(whole) == 2 and not shards, "one for the held-out pairs, one for the training pairs"


def _watch(settings: dict[str, Any]) -> list[bool]:
    """After every step, whether the reference's stage is alive."""
    from megadpo.parallel.world import joined_world
    from megadpo.training.run import Callbacks
    from megadpo.training.setup import prepare
    from megadpo.training.trainer import build, training_step

    setup, alive = prepare(load_config(settings)), []
    with joined_world(setup.layout, 1):
        run = build(setup, Callbacks())
        model = weakref.ref(run.references.train.stage.model)
        for step in range(setup.num_steps):
            training_step(run, step)
            alive.append(model() is not None)
        run.close()
    return alive


def test_the_reference_is_let_go_with_the_last_pair_of_the_first_epoch(files: Path, tmp_path: Path) -> None:
    alive = run_world(1, _watch, _of(files, tmp_path, "run"))[0]
    assert alive == [True] * STEPS_OF_FIRST_EPOCH + [False] * (len(alive) - STEPS_OF_FIRST_EPOCH) and not alive[-1]


@pytest.mark.slow
def test_a_run_killed_in_its_first_epoch_goes_on_bit_for_bit_and_others_read_what_it_left(
    files: Path, tmp_path: Path
) -> None:
    def settings(name: str) -> dict[str, Any]:
        (tmp_path / name).mkdir(exist_ok=True)
        return _of(files, tmp_path / name, "run", checkpoint={"every": 1})

    whole = run_world(2, train_run, settings("whole"))[0]
    run_world(2, train_run, settings("broken"), 2)
    (_, shards) = _files_of(tmp_path / "broken")
    left = np.concatenate([load_file(shard)["responses"] for shard in shards])
    assert len(left) == len(set(left)) == 2 * 8 * 2, "both responses of the pairs of two steps, each written once"
    other = _of(files, tmp_path / "broken", "other", train=NO_WARM_UP | {"seed": 7})
    run_world(1, train_run, other)
    assert len(_files_of(tmp_path / "broken")[0]) == 1 and not _files_of(tmp_path / "broken")[1]
    first = load_file(_files_of(tmp_path / "whole")[0][0])["logps_R"]
    np.testing.assert_allclose(load_file(_files_of(tmp_path / "broken")[0][0])["logps_R"], first, rtol=1e-5)
    _close(run_world(2, train_run, settings("broken"))[0], whole)


@pytest.mark.slow
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(files: Path, tmp_path: Path) -> None:
    def settings(name: str) -> dict[str, Any]:
        (tmp_path / name).mkdir(exist_ok=True)
        return _of(files, tmp_path / name, "run", checkpoint={"every": 2}, parallel={"pipeline": 2})

    resumed, whole = resumed_and_whole(2, settings, 3)
    assert resumed == whole


@pytest.mark.slow
def test_precomputed_and_cached_share_their_cache(files: Path, tmp_path: Path) -> None:
    names = [("first", "cached"), ("second", "precomputed"), ("third", "cached")]
    first, second, third = run_world(1, train_each, [_of(files, tmp_path, name, mode) for name, mode in names])[0]
    assert second == third, "both look up what the first one wrote"
    _close(second, first)
    assert len(_files_of(tmp_path)[0]) == 1


def test_a_damaged_shard_is_told_and_removed(tmp_path: Path) -> None:
    from megadpo.training.reference_cache import _read_all, parts_of, write_logps

    path, said = tmp_path / "key.safetensors", list[str]()
    good, bad = parts_of(path) / "a.safetensors", parts_of(path) / "b.safetensors"
    write_logps(good, {"responses": np.array([1, 2]), "logps": np.array([-1.0, -2.0])}, "key")
    bad.write_bytes(b"half")
    found = _read_all(path, 4, said.append)
    assert found.tolist()[1:3] == [-1.0, -2.0] and np.isnan(found[[0, 3]]).all()
    assert len(said) == 1 and said[0].startswith(f"the reference cache {bad} is damaged") and not bad.exists()
    assert np.isnan(_read_all(path, 2, said.append)).all() and "beyond the 2 that there are" in said[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": {"mode": "cached", "sync_every": 4}}, "moves a resident reference"),
        ({"reference": {"mode": "cached"}, "objective": {"loss_type": "kto"}}, "kto needs .*mode to auto"),
        ({"reference": {"mode": "cached", "tokens_per_micro_batch": 4096}}, "a reference that is cached runs on train's"),
    ],
)
def test_what_a_cached_reference_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(changes)
