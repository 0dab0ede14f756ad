"""Secrets are known by where they stand, by their form and by the environment; what is none stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadpo.errors import UserError
from megadpo.secrets.redact import is_secret_name, redact, redact_exception, redacted, redacted_paths

CANARY = "canary4f1c9e77"


@pytest.mark.parametrize(
    "text",
    [
        f"https://user:{CANARY}@host/rows.jsonl",
        f"s3://{CANARY}@bucket/rows",
        f"https://user:p@{CANARY}@host:8080/x",
        f"postgresql+psycopg://me:{CANARY}@db/mlflow",
        f"https://host/x?token={CANARY}&page=2",
        f"https://host/x?a=1&X-Amz-Signature={CANARY}#part",
        f"https://host/x?sv=1&sig={CANARY}",
        f"HF_TOKEN={CANARY} megadpo train run.yaml",
        f"WANDB_API_KEY='{CANARY}'",
        f"--api-key={CANARY}",
        f"password: {CANARY}",
        f"HF_TOKEN: {CANARY}",
        f"{{'WANDB_API_KEY': '{CANARY}'}}",
        f"mine --token {CANARY} run.yaml",
        f"mine --hf-token={CANARY}",
        f"['mine', '--api-key', '{CANARY}']",
        f"nvapi-{CANARY}{CANARY}",
        f"AccountName=me;AccountKey={CANARY}==;EndpointSuffix=x",
        f"-----BEGIN RSA PRIVATE KEY-----\n{CANARY}\n{CANARY}\n-----END RSA PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----\n{CANARY}",
        f"{{'Authorization': 'Bearer {CANARY}'}}",
        f"hf_{CANARY}{CANARY}{CANARY}",
        f"sk-{CANARY}{CANARY}",
        f"sk-proj-{CANARY}_{CANARY}-{CANARY}",
        f"ghp_{CANARY}{CANARY}",
    ],
)
def test_a_secret_is_hidden_by_where_it_stands_or_what_it_looks_like(text: str) -> None:
    shown = redact(text, environ={})
    assert CANARY not in shown and "***" in shown


NAMES = ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "DB_PASSWORD"]


@pytest.mark.parametrize("name", [*NAMES, "PGPASSWORD", "HFTOKEN", "WANDBAPIKEY"])
def test_the_value_of_a_variable_with_such_a_name_is_hidden_wherever_it_stands(name: str) -> None:
    assert redact(f"no access with {CANARY}/x, as asked for", {name: CANARY}) == "no access with ***/x, as asked for"


@pytest.mark.parametrize("before", ["wandb login ", "API key: ", "the token is '", "password "])
def test_forty_hexadecimal_digits_are_a_key_where_a_word_says_so(before: str) -> None:
    assert redact(f"{before}{'0123456789abcdef' * 2}01234567", {}) == f"{before}***"
    assert redact(f"commit {'0123456789abcdef' * 2}01234567", {}).endswith("01234567")


def test_a_password_in_a_variable_s_url_is_hidden_alone_and_as_a_url_writes_it() -> None:
    environ = {"HTTPS_PROXY": f"http://me:{CANARY}@proxy:3128", "HF_TOKEN": f"{CANARY}/+x"}
    assert redact(f"proxy says {CANARY}", environ) == "proxy says ***"
    assert CANARY not in redact(f"?t={CANARY}%2F%2Bx", environ)


@pytest.mark.parametrize(
    "text",
    [
        "data.train: pairs.jsonl has no rows; train.tokens_per_micro_batch=4096",
        "the tokenizer has no pad_token: set pad_token: <pad>, eos_token='</s>'",
        "https://host:8080/path/to/rows.jsonl?page=2 and git@github.com:me/x",
        "num_tokens: 12, key.sub=value",
        "--pad-token <|endoftext|> --max-new-tokens 123456789 --token",
        "model meta-llama/Llama-3.1-8B-Instruct, keys step_00000001",
        "/data/sk-learn-preference-dataset-v2/train.jsonl and /models/hf_llama3instructfinal2",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text, {"TOKENIZERS_PARALLELISM": "false", "PWD": "/path/to/rows.jsonl", "MY_KEY": "page"}) == text


def test_names_of_directories_and_counts_are_no_secrets() -> None:
    assert not any(map(is_secret_name, ["PATH", "PWD", "TOKENIZERS_PARALLELISM", "tokens_per_micro_batch", "KEYBOARD_MAP"]))
    telling = ["AWS_SECRET_NAME", "TOKEN_TYPE", "KEY_DIR", "S3_KEY_PATH", "HF_TOKEN_FILE", "TOKEN_URL", "VAULT_SECRET_ID"]
    assert not any(map(is_secret_name, telling))


def test_of_a_path_that_is_here_only_the_credentials_of_a_url_are_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S3_KEY", "preferences")
    here = tmp_path / "preferences" / "hf_llama3instructfinal2withalonglongname"
    here.mkdir(parents=True)
    given = [str(here), f"{here}/*.jsonl", {"path": str(here), "split": "preferences"}]
    assert redacted_paths(given) == [str(here), f"{here}/*.jsonl", {"path": str(here), "split": "***"}]
    assert redacted_paths([f"https://a:{CANARY}@h/x", "s3://preferences/x", None]) == ["https://***@h/x", "s3://***/x", None]


def test_a_configuration_is_hidden_text_by_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    given = {
        "data": {"train": [{"path": f"https://a:b{CANARY}@h/x"}, 3, None]},
        "api_key": "short",
        "steps": 5,
        "name": CANARY,
    }
    assert redacted(given) == {
        "data": {"train": [{"path": "https://***@h/x"}, 3, None]},
        "api_key": "***",
        "steps": 5,
        "name": "***",
    }


def test_messages_of_an_exception_and_of_those_it_came_of_are_hidden() -> None:
    try:
        try:
            raise OSError(2, f"no https://u:{CANARY}@h/x")
        except OSError as error:
            raise ValueError(f"with token https://h/?token={CANARY}") from error
    except ValueError as error:
        redact_exception(error)
        assert CANARY not in str(error) and CANARY not in str(error.__cause__)
        assert CANARY not in str(UserError(f"https://u:{CANARY}@h/x"))
