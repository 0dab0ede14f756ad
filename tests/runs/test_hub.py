"""The Hub, spoken to over HTTP on this machine: models that a run takes from it, a model that it gives; what is refused at
once, and a token that is seen nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadpo.errors import UserError
from megadpo.platform.hub import id_of_snapshot, is_id, means_hub
from megadpo.validation.load import load_config
from tests.helpers.hub import COMMIT, READER, WRITER, Hub, local_hub
from tests.helpers.runs import run_settings, save_files

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_files(tmp_path_factory.mktemp("hub"), "llama", 40)


@pytest.fixture
def hub(files: Path) -> Iterator[Hub]:
    with local_hub() as hub:
        there = hub.add("acme/tiny", files / "model")
        there.files |= {
            "README.md": b"---\nlicense: mit\n---\n",
            "modeling.py": b"raise SystemExit",
            "pytorch_model.bin": b"x",
        }
        yield hub


def environment(hub: Hub, files: Path, token: str | None = WRITER, **more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RANK", "WORLD_SIZE"))}
    tokens = {} if token is None else {"HF_TOKEN": token}
    return {
        **clean,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(files / "hf-home"),
        "PYTHONPATH": str(ROOT),
        **tokens,
        **more,
    }


def finish(local: Hub, files: Path, name: str, **changes: dict[str, Any]) -> tuple[int, str]:
    settings = run_settings(
        files, files / name, **{"train": {"steps": 1, "pairs_per_step": 4, "warmup_steps": 0}, **changes}
    )
    settings["model"] |= {"path": "acme/tiny"}
    (files / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "megadpo", "train", str(files / f"{name}.yaml")]
    done = subprocess.run(command, env=environment(local, files), cwd=files, capture_output=True, text=True, timeout=300)
    assert done.stdout == ""
    return done.returncode, done.stderr


@pytest.mark.slow
def test_a_run_takes_its_model_from_the_hub_and_gives_what_it_trained(hub: Hub, files: Path) -> None:
    options = {"hub": {"push": "acme/trained", "revision": "first-try"}}
    hub.refuses_commits = True
    status, output = finish(hub, files, "run", **options)
    assert status == 2, output
    assert "megadpo: the model will be pushed to acme/trained, by somebody" in output
    assert f"megadpo: warning: {files / 'run' / 'hf'} was not pushed to acme/trained: " in output
    assert output.splitlines()[-1].startswith("megadpo: error: the run is finished, but its model was not pushed"), output
    exported = {
        path.relative_to(files / "run" / "hf").as_posix(): path.read_bytes() for path in (files / "run" / "hf").rglob("*")
    }
    assert {"model.safetensors", "README.md", "config.json"} <= exported.keys(), "all of it is there"

    hub.refuses_commits = False
    hub.repositories["acme/trained"].files |= {"adapter_config.json": b"{}", "old.safetensors": b"x", "notes.txt": b"kept"}
    status, again = finish(hub, files, "run", **options)
    assert status == 0 and "nothing is left to train" in again, again
    assert f"megadpo: pushed to {hub.endpoint}/acme/trained, branch first-try" in again
    repository = hub.repositories["acme/trained"]
    assert repository.is_private and repository.pushed_to == ["first-try"]
    assert repository.files.pop("notes.txt") == b"kept"
    assert repository.files == {path.name: path.read_bytes() for path in (files / "run" / "hf").iterdir()}, (
        "byte by byte, and nothing of another model"
    )

    snapshot = yaml.safe_load((files / "run" / "config.yaml").read_text())["model"]["path"]
    assert snapshot.endswith(f"models--acme--tiny/snapshots/{COMMIT}") and id_of_snapshot(snapshot) == "acme/tiny"
    assert not any("modeling.py" in request or ".bin" in request for request in hub.requests), "no code, no pickle"
    card = repository.files["README.md"].decode()
    matter = yaml.safe_load(card.split("---\n")[1])
    assert (matter["base_model"], matter["license"]) == ("acme/tiny", "mit")
    assert 'AutoModelForCausalLM.from_pretrained("acme/trained")' in card
    for path in (files / "run").rglob("*"):
        assert not path.is_file() or WRITER.encode() not in path.read_bytes(), path
    assert WRITER not in output + again


ASKED = """
import json, os, sys
from megadpo.errors import UserError
from megadpo.doctor import examine
from megadpo.platform import hub
answers = []
for call, token in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None) if token is None else os.environ.update(HF_TOKEN=token)
    try:
        answers.append(str(eval(call)))
    except UserError as error:
        answers.append(f"refused: {error}")
print(json.dumps(answers))
"""
DOCTOR = 'examine.pushing("acme/out", True)'
PUSH, FETCH = 'hub.check_push("acme/out", True)', 'hub.fetched({!r}, "model.path", {!r})'
OFFLINE, NOBODY_THERE = {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}
NOT_GIVEN: list[tuple[str, str | None, dict[str, str], str]] = [
    (PUSH, WRITER, {}, "somebody"),
    (PUSH, None, {}, "refused: hub.push acme/out: there is no token; put one that may write into HF_TOKEN, or run"),
    (DOCTOR, None, {}, "status='failed', found='hub.push acme/out: there is no token"),
    (DOCTOR, WRITER, {}, "status='ok', found='acme/out, as somebody'"),
    (PUSH, READER, {}, "refused: hub.push acme/out: this token may only read"),
    (PUSH, "hf_" + "x" * 36, {}, "does not know this token"),
    (PUSH, WRITER, OFFLINE, "refused: hub.push acme/out: HF_HUB_OFFLINE is set"),
    (
        PUSH,
        WRITER,
        NOBODY_THERE,
        "refused: hub.push acme/out: the Hub (http://127.0.0.1:9) cannot",
    ),
    (
        FETCH.format("acme/none", None),
        None,
        {},
        "refused: model.path: acme/none is no directory here, and there is no model",
    ),
    (FETCH.format("acme/tiny", "v9"), None, {}, "acme/tiny has no branch, tag or commit 'v9' on the Hub"),
    (FETCH.format("acme/gated", None), None, {}, "a model whose licence has to be accepted at http://127.0.0.1"),
    (
        FETCH.format("acme/never", None),
        None,
        OFFLINE,
        "HF_HUB_OFFLINE is set and the Hub's cache does not",
    ),
    (
        FETCH.format("acme/tiny", None),
        None,
        NOBODY_THERE,
        "(http://127.0.0.1:9) cannot be reached",
    ),
]
"""What is called, the token, the environment, words of the answer."""


def ask(known: dict[str, str], *calls: tuple[str, str | None]) -> list[str]:
    """The answers of one process."""
    command = [sys.executable, "-c", ASKED, json.dumps(calls)]
    done = subprocess.run(command, env=known, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@pytest.fixture(scope="module")
def answers(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """By the number of a case: a process for each environment, as huggingface_hub reads it when it is imported."""
    found: dict[int, str] = {}
    with local_hub() as hub:
        hub.add("acme/tiny", files / "model")
        hub.add("acme/gated", files / "model", is_gated=True)
        for more in ({}, OFFLINE, NOBODY_THERE):
            numbers = [number for number, case in enumerate(NOT_GIVEN) if case[2] == more]
            empty_cache = environment(hub, tmp_path_factory.mktemp("cache"), None, **more)
            said = ask(empty_cache, *(NOT_GIVEN[number][:2] for number in numbers))
            found |= dict(zip(numbers, said, strict=True))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(NOT_GIVEN)))
def test_what_the_hub_does_not_give_is_one_sentence(number: int, answers: dict[int, str]) -> None:
    _, token, _, words = NOT_GIVEN[number]
    said = answers[number]
    assert words in said and "\n" not in said
    assert token is None or token not in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hub": {"push": "trained"}}, "hub.push: 'trained' is no repository's name; give OWNER/NAME"),
        ({"hub": {"push": "acme/a..b"}}, "hub.push: 'acme/a..b' is no repository's name"),
        ({"hub": {"push": "https://huggingface.co/acme/a"}}, "is no repository's name"),
        ({"hub": {"private": False}}, "hub.private has no effect without hub.push"),
        ({"hub": {"revision": "x"}}, "hub.revision has no effect without hub.push"),
        ({"hub": {"push": "acme/a", "revision": "../x"}}, "hub.revision: '../x' is no name of a branch"),
        ({"model": {"path": "acme/tiny", "revision": ""}}, "model.revision"),
        ({"hub": {"token": "x"}}, "hub.token"),
        ({"train": {"push_to_hub": True}}, "push_to_hub of transformers is hub.push here"),
        ({"train": {"hub_token": "x"}}, "hub_token of transformers has no counterpart here: the token is that of HF_TOKEN"),
    ],
)
def test_names_that_the_hub_would_not_take_are_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(options)
    assert words in str(refused.value)


def test_a_path_means_the_hub_only_where_nothing_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert means_hub("acme/tiny") and not means_hub("models/tiny"), "a directory that is here: a mistyped name in it"
    for path in ("tiny", "/acme/tiny", "./acme/tiny", "a/b/c", "acme/tiny.git", "acme/a--b", "~/tiny", ""):
        assert not means_hub(path), path
    assert is_id("Qwen/Qwen2.5-0.5B-Instruct") and id_of_snapshot("/x/snapshots/1") is None


@pytest.mark.slow
def test_an_adapter_is_pushed_with_its_base_as_others_know_it(hub: Hub, files: Path) -> None:
    options = {"hub": {"push": "acme/adapter"}, "adapter": {"kind": "lora", "rank": 4}}
    status, output = finish(hub, files, "adapter", **options)
    assert status == 0, output
    pushed = json.loads(hub.repositories["acme/adapter"].files["adapter_config.json"])
    assert (pushed["base_model_name_or_path"], pushed["revision"]) == ("acme/tiny", COMMIT)
    here = json.loads((files / "adapter" / "hf" / "adapter_config.json").read_text())
    assert Path(here["base_model_name_or_path"]).is_dir(), "here it is loaded from the cache"


@pytest.mark.slow
def test_a_public_repository_is_not_pushed_to_where_a_private_one_is_asked_for(hub: Hub, files: Path) -> None:
    hub.add("acme/out", files / "model")
    calls = [(f'hub.check_push("acme/out", {is_private})', WRITER) for is_private in (True, False)]
    private, public = ask(environment(hub, files), *calls)
    assert private.startswith("refused: hub.push acme/out: that repository is there and public")
    assert public.startswith("somebody")
