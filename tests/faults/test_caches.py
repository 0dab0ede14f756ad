"""Damaged, swapped, stale, foreign and full caches: found when they are opened, made again, and never code of a stranger.

What a run learns is held against what it learns without a cache.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megadpo.config.schema import DataConfig
from megadpo.data.rows.dataset import prepare_groups
from megadpo.data.store import GroupStore
from megadpo.errors import UserError
from megadpo.files import ALGORITHM, hash_of_file, sealed
from megadpo.platform import native
from megadpo.training.reference_cache import parts_of, read_logps, write_logps
from tests.helpers.models import save_model, write_hh

NUM_RESPONSES = 6
LOGPS = np.array([-1.5, -2.5, -3.5, -4.5, -5.5, -6.5])
ARRAYS = ("tokens_T", "segment_offsets_S", "group_segments_G", "num_prompts_G", "rows_G", "sources_G")

Spoil = Callable[[Path], None]


def flip(file: Path, place: float) -> None:
    """One bit, at this part of the file."""
    content = bytearray(file.read_bytes())
    content[min(int(place * len(content)), len(content) - 1)] ^= 1 << (len(content) % 8)
    file.write_bytes(content)


def cut(file: Path, place: float) -> None:
    file.write_bytes(file.read_bytes()[: int(place * file.stat().st_size)])


def zeroed(file: Path) -> None:
    content = bytearray(file.read_bytes())
    start = len(content) // 2
    content[start : start + 512] = bytes(min(512, len(content) - start))
    file.write_bytes(content)


def longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def become_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def become_dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.with_name("nowhere"))


def about_with(**changes: Any) -> Spoil:
    """store.json as somebody may edit it, without its hash."""

    def spoil(store: Path) -> None:
        text = (store / "store.json").read_text()
        (store / "store.json").write_text(json.dumps(json.loads(text) | changes))

    return spoil


def sealed_with(**changes: Any) -> Spoil:
    """The same with a hash that is right: another version's, another store's, or no longer what the files are."""

    def spoil(store: Path) -> None:
        about = json.loads((store / "store.json").read_bytes()) | changes
        about.pop(ALGORITHM)
        (store / "store.json").write_bytes(sealed(about))

    return spoil


def array_with(name: str, values: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    """An array that is whole and wrong, with a hash that is right: offsets that lead outside."""

    def spoil(store: Path) -> None:
        file = store / f"{name}.npy"
        np.save(file, values(np.load(file)))
        about = json.loads((store / "store.json").read_bytes())
        about["hashes"][name] = hash_of_file(file)
        about.pop(ALGORITHM)
        (store / "store.json").write_bytes(sealed(about))

    return spoil


def of_file(name: str, damage: Callable[..., None], *arguments: Any) -> Spoil:
    return lambda store: damage(store / name, *arguments)


def swapped(store: Path) -> None:
    (store / "rows_G.npy").rename(store / "x")
    (store / "segment_offsets_S.npy").rename(store / "rows_G.npy")
    (store / "x").rename(store / "segment_offsets_S.npy")


def pickled(store: Path) -> None:
    np.save(store / "rows_G.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


def beyond(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array[:-1], array[-1:] + 1000])


TOKENS: dict[str, Spoil] = {
    "a bit of the tokens": of_file("tokens_T.npy", flip, 0.6),
    "a bit of store.json": of_file("store.json", flip, 0.5),
    "offsets beyond the end": array_with("segment_offsets_S", beyond),
    "tokens cut": of_file("tokens_T.npy", cut, 0.7),
    "store.json is gone": of_file("store.json", Path.unlink),
    "a file is a directory": of_file("rows_G.npy", become_directory),
    **{f"a bit of {name}'s head": of_file(f"{name}.npy", flip, 0.02) for name in ARRAYS},
    **{f"a bit of {name}'s values": of_file(f"{name}.npy", flip, 0.99) for name in ARRAYS[1:]},
    **{f"a block of {name} is zero": of_file(f"{name}.npy", zeroed) for name in ARRAYS[:2]},
    **{f"{name} is empty": of_file(f"{name}.npy", cut, 0) for name in ARRAYS[:3]},
    **{f"{name} is longer": of_file(f"{name}.npy", longer) for name in ARRAYS[3:]},
    **{f"{name} is gone": of_file(f"{name}.npy", Path.unlink) for name in ARRAYS[2:5]},
    "store.json is cut": of_file("store.json", cut, 0.5),
    "store.json is empty": of_file("store.json", cut, 0),
    "store.json is no text": lambda store: (store / "store.json").write_bytes(b"\xff\xfe\x00"),
    "store.json is a list": lambda store: (store / "store.json").write_text("[]"),
    "store.json is edited": about_with(num_groups=3),
    "of another version": sealed_with(format_version=99),
    "of another key": sealed_with(key="other"),
    "other hashes": sealed_with(hashes={}),
    "a report that is none": sealed_with(extra={"surprise": 1}),
    "fewer groups than there are": sealed_with(num_groups=1),
    "two arrays are swapped": swapped,
    "an array is a pickle": pickled,
    "offsets go back": array_with("segment_offsets_S", lambda array: array[::-1].copy()),
    "groups beyond the end": array_with("group_segments_G", beyond),
    "a group of no prompt": array_with("num_prompts_G", np.zeros_like),
    "a source that is not there": array_with("sources_G", lambda array: array + 7),
    "a negative token": array_with("tokens_T", lambda array: -1 - array),
    "floats for offsets": array_with("segment_offsets_S", lambda array: array.astype(np.float64)),
    "a dangling link": of_file("tokens_T.npy", become_dangling),
}
FAST_TOKENS = 6


def edited(**arrays: np.ndarray) -> Spoil:
    """Arrays in place of what was written, under the same metadata."""
    from safetensors import safe_open

    def spoil(file: Path) -> None:
        with safe_open(file, framework="np") as opened:
            metadata = opened.metadata()
        save_file({**load_file(file), **arrays}, file, metadata=metadata)

    return spoil


def written(key: str = "key", **arrays: np.ndarray) -> Spoil:
    """Arrays with a hash that is right."""
    return lambda file: write_logps(file, arrays, key)


REFERENCE: dict[str, Spoil] = {
    "a bit of the values": lambda file: flip(file, 0.99),
    "a bit of the head": lambda file: flip(file, 0.3),
    "cut": lambda file: cut(file, 0.8),
    "not finite": written(logps_R=np.where(LOGPS < -6, np.nan, LOGPS)),
    "of another key": written("other", logps_R=LOGPS - 1),
    "without hash": lambda file: save_file({"logps_R": LOGPS - 1}, file),
    "empty": lambda file: cut(file, 0),
    "longer": longer,
    "zeroes": zeroed,
    "no safetensors": lambda file: file.write_text("{}"),
    "a directory": become_directory,
    "a dangling link": become_dangling,
    "an edited value": edited(logps_R=LOGPS - 1),
    "another name": written(logps=LOGPS),
    "fewer": written(logps_R=LOGPS[:4]),
    "in single precision": written(logps_R=LOGPS.astype(np.float32)),
    "infinite": written(logps_R=LOGPS - np.inf),
    "of two dimensions": written(logps_R=LOGPS[None]),
    "a first bit": lambda file: flip(file, 0.0),
}
FAST_REFERENCE = 6
assert len(TOKENS) + len(REFERENCE) >= 60


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    save_model(directory / "model", "llama", num_hidden_layers=1)
    write_hh(directory / "rows.jsonl", 20)
    return directory


@pytest.fixture(scope="module")
def clean(files: Path) -> tuple[Path, str]:
    """A token cache, and the digest of its groups."""
    return files / "cache", groups_of(files, files / "cache").digest


def groups_of(files: Path, cache: Path) -> GroupStore:
    options = DataConfig(cache_dir=str(cache), num_workers=1)
    return prepare_groups(options, str(files / "rows.jsonl"), str(files / "model")).groups


def exhaustive_after(count: int, cases: dict[str, Spoil]) -> list[Any]:
    names = list(cases)
    return [*names[:count], *(pytest.param(name, marks=pytest.mark.exhaustive) for name in names[count:])]


@pytest.mark.parametrize("case", exhaustive_after(FAST_TOKENS, TOKENS))
def test_a_damaged_token_cache_is_told_and_made_again(
    files: Path, clean: tuple[Path, str], tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(clean[0], tmp_path / "cache")
    (store,) = (tmp_path / "cache" / "groups").glob("*/")
    TOKENS[case](store)
    groups = groups_of(files, tmp_path / "cache")
    assert groups.digest == GroupStore(groups.columns).digest == clean[1]
    said = capfd.readouterr().err
    assert said.count("is damaged") == 1 and str(store) in said and "made again" in said, said
    again = groups_of(files, tmp_path / "cache")
    assert again.digest == clean[1] and not capfd.readouterr().err, "sound from then on"
    assert [path.name for path in store.parent.iterdir() if path.suffix != ".lock"] == [store.name], "nothing is left over"


@pytest.mark.parametrize("case", exhaustive_after(FAST_REFERENCE, REFERENCE))
def test_a_damaged_reference_cache_is_told_and_not_read(tmp_path: Path, case: str) -> None:
    path, said = tmp_path / "key.safetensors", list[str]()
    write_logps(path, {"logps_R": LOGPS})
    found = read_logps(path, NUM_RESPONSES, said.append)
    assert found is not None and found.tolist() == LOGPS.tolist() and not said
    REFERENCE[case](path)
    assert read_logps(path, NUM_RESPONSES, said.append) is None
    assert len(said) == 1 and said[0].startswith(f"the reference cache {path} is damaged")
    write_logps(path, {"logps_R": LOGPS})
    again = read_logps(path, NUM_RESPONSES, said.append)
    assert again is not None and len(said) == 1 and [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(60))
def test_random_bits_of_a_token_cache_are_found(
    files: Path, clean: tuple[Path, str], tmp_path: Path, seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(seed)
    shutil.copytree(clean[0], tmp_path / "cache")
    (store,) = (tmp_path / "cache" / "groups").glob("*/")
    damaged = sorted(store.iterdir())
    flip(damaged[random.integers(len(damaged))], random.random())
    assert groups_of(files, tmp_path / "cache").digest == clean[1] and "is damaged" in capfd.readouterr().err


def test_a_swapped_cache_is_another_key_s(files: Path, clean: tuple[Path, str], tmp_path: Path) -> None:
    """The whole store of other rows, in the place of this one's."""
    shutil.copytree(clean[0], tmp_path / "cache")
    (store,) = (tmp_path / "cache" / "groups").glob("*/")
    rows = (files / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(rows[:-3]))
    options = DataConfig(cache_dir=str(tmp_path / "other"), num_workers=1)
    prepare_groups(options, str(tmp_path / "other.jsonl"), str(files / "model"))
    (other,) = (tmp_path / "other" / "groups").glob("*/")
    shutil.rmtree(store)
    shutil.copytree(other, store)
    assert groups_of(files, tmp_path / "cache").digest == clean[1]


def test_every_user_whom_the_directory_is_open_to_can_read_a_cache(clean: tuple[Path, str]) -> None:
    (store,) = (clean[0] / "groups").glob("*/")
    mask = os.umask(0)
    os.umask(mask)
    for path in (store, *store.iterdir()):
        assert path.stat().st_mode & 0o444 == 0o444 & ~mask, path


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads and writes everything")
def test_a_cache_that_cannot_be_read_or_written_is_one_sentence(
    files: Path, clean: tuple[Path, str], tmp_path: Path
) -> None:
    _unreadable(files, clean, tmp_path)


def _unreadable(files: Path, clean: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(clean[0], tmp_path / "cache")
    (store,) = (tmp_path / "cache" / "groups").glob("*/")
    for path, mode in ((store / "tokens_T.npy", 0), (store, 0), (store.parent, 0o500), (store.parent, 0)):
        before = path.stat().st_mode
        if mode == 0o500:
            shutil.rmtree(store)
        path.chmod(mode)
        with pytest.raises(
            UserError, match=r"data.cache_dir: .* cannot be read or written \(Permission denied\); have its own"
        ):
            groups_of(files, tmp_path / "cache")
        path.chmod(before)


def test_a_cache_that_cannot_be_read_or_written_is_one_sentence_for_another_user(
    files: Path, clean: tuple[Path, str], tmp_path: Path
) -> None:
    """Root becomes nobody for the attempt."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    shutil.copytree(clean[0], tmp_path / "cache")
    in_child = os.fork()
    if in_child == 0:
        status = 1
        try:
            for path in (tmp_path, *tmp_path.rglob("*")):
                os.chown(path, 65534, 65534)
            os.chown(tmp_path.parent, 65534, 65534)
            for parent in (files, *files.parents, tmp_path, *tmp_path.parents):
                if not parent.stat().st_mode & 0o001:
                    os.chmod(parent, 0o755)
            os.setuid(65534)
            _unreadable(files, (tmp_path / "cache", ""), _made(tmp_path / "second"))
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(in_child, 0)[1] == 0


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


ATTACKS = {
    "another user's file": lambda cache, file: os.chown(file, 12345, 12345),
    "another user's directory": lambda cache, file: os.chown(file.parent, 12345, 12345),
    "another user's cache": lambda cache, file: os.chown(cache, 12345, 12345),
    "a file open to all": lambda cache, file: file.chmod(0o777),
    "a file open to the group": lambda cache, file: file.chmod(0o775),
    "a cache open to the group": lambda cache, file: cache.chmod(0o2775),
    "a link": lambda cache, file: (file.rename(cache / "x"), file.symlink_to(cache / "x")),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_code_of_strangers_is_never_loaded_but_compiled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    if "another user" in attack and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    cache = tmp_path / "cache"
    monkeypatch.setenv("MEGADPO_CACHE", str(cache))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(native, "_compile", lambda library, compiler, key, to: to.write_bytes(b"ours"))
    monkeypatch.setattr(native, "find_compiler", lambda library: "compiler")
    library = native.LIBRARIES["head"]
    first = native.built(library, "key")
    assert first.parent == cache / "kernels" and native.is_trusted(first)
    first.write_bytes(b"theirs")
    ATTACKS[attack](cache, first)
    found = native.built(library, "key")
    assert found.read_bytes() == b"ours" and native.is_trusted(found) and native.is_trusted(found.parent)
    assert found.is_relative_to(tmp_path / "home" if "cache" in attack else cache)
    assert native.built(library, "key").read_bytes() == b"ours", "and again"


def test_a_library_in_the_package_that_others_can_write_to_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "_head.so"
    theirs.write_bytes(b"")
    theirs.chmod(0o666)
    loaded: list[str] = []
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    monkeypatch.setattr(native, "source_key", lambda library: "key")
    monkeypatch.setattr(native, "built", lambda library, key: tmp_path / "ours.so")
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: loaded.append(path))
    native.load.__wrapped__("head")
    assert loaded == [str(tmp_path / "ours.so")]


def test_a_reference_cache_that_cannot_be_written_does_not_end_a_run(files: Path, tmp_path: Path) -> None:
    from tests.helpers.runs import run_settings, train_run
    from tests.helpers.worlds import run_world

    shutil.copy(files / "rows.jsonl", files / "train.jsonl")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "reference").write_text("a file where the directory would be")
    changes: dict[str, Any] = {"reference": {"mode": "precomputed"}, "data": {"cache_dir": str(cache)}}
    settings = run_settings(files, tmp_path / "run", train={"steps": 2}, **changes)
    assert len(run_world(1, train_run, settings)[0]) == 2


def test_shards_of_another_cache_are_not_taken_in(tmp_path: Path) -> None:
    from megadpo.training.reference_cache import _read_all

    path, said = tmp_path / "key.safetensors", list[str]()
    arrays = {"responses": np.arange(2), "logps": np.array([-1.0, -2.0])}
    write_logps(parts_of(path) / "mine.safetensors", arrays, "key")
    write_logps(parts_of(path) / "theirs.safetensors", {**arrays, "responses": np.arange(2) + 2}, "other")
    assert np.isnan(_read_all(path, 4, said.append)).tolist() == [False, False, True, True] and len(said) == 1
