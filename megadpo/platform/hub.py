"""The Hugging Face Hub: models that are fetched from it, a trained one that is pushed to it.

By huggingface_hub, with the token of the environment (`HF_TOKEN`) or of its log-in, which is written nowhere. `HF_ENDPOINT`
names another Hub, `HF_HUB_OFFLINE` none.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from megadpo.console.activity import activity
from megadpo.errors import UserError, reason

_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
ID = re.compile(rf"{_PART}/{_PART}")
"""OWNER/NAME as the Hub allows it, but for `--` and `..`, which it refuses."""
FILES = (
    *("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "tokenizer*", "vocab*", "merges.txt"),
    *("LICENSE*", "NOTICE*", "README.md"),
)
"""What is fetched of a model: tensors, JSON, the tokenizer and words about it; no code, no pickles."""
LEFT_OUT = ("original/*", "*/*.safetensors", "*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.gguf", "*.onnx")
OF_A_MODEL = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
SECONDS_TO_ANSWER = 10.0


def is_id(text: str) -> bool:
    """Whether a text has the form of a Hub id."""
    return ID.fullmatch(text) is not None and "--" not in text and ".." not in text and not text.endswith(".git")


def means_hub(path: str) -> bool:
    """Whether a path names a model on the Hub: it has the form of an id, nothing is here under that name, and no directory
    `OWNER` either, in which it would be a mistyped file."""
    return is_id(path) and not os.path.lexists(path) and not Path(path.partition("/")[0]).is_dir()


def id_of_snapshot(path: str | Path) -> str | None:
    """OWNER/NAME of a directory in huggingface_hub's cache (…/models--OWNER--NAME/snapshots/COMMIT); None of another."""
    parts = Path(os.path.abspath(path)).parts
    is_one = len(parts) > 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--")
    return "/".join(parts[-3].split("--")[1:]) if is_one else None


def fetched(path: str, setting: str, revision: str | None = None) -> str:
    """The directory of a model that is on the Hub, fetched now where it is not in huggingface_hub's cache; any other path as
    it is.

    Args:
        setting: the option that names it, for error messages.
        revision: branch, tag or commit; None: `main`.

    Raises:
        UserError: the Hub cannot be reached, does not have it, or does not give it to this user.
    """
    if not means_hub(path):
        return path
    from huggingface_hub import constants, errors, snapshot_download

    at = f"{path}{f' at {revision}' if revision else ''}"
    what = f"{setting}: {path} is no directory here, and"
    try:
        with activity(f"fetching {at} from the Hub"), _without_bars():
            return snapshot_download(
                path,
                revision=revision,
                allow_patterns=list(FILES),
                ignore_patterns=list(LEFT_OUT),
                etag_timeout=SECONDS_TO_ANSWER,
            )
    except errors.GatedRepoError as error:
        raise UserError(
            f"{setting}: {path} is a model whose licence has to be accepted at {constants.ENDPOINT}/{path}, with a token of "
            "that account in HF_TOKEN or by `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{setting}: {path} has no branch, tag or commit {revision!r} on the Hub; look for it there"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{what} there is no model of that name on the Hub ({constants.ENDPOINT}), or this token may not see it; give a "
            "directory, or OWNER/NAME as on its page"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"{what} is no name of the Hub's: {reason(error)}") from error
    except Exception as error:  # of its network library, which has changed before
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{what} HF_HUB_OFFLINE is set and the Hub's cache does not have {at}; give a directory, or fetch it first"
            ) from error
        raise UserError(
            f"{what} the Hub ({constants.ENDPOINT}) cannot be reached for {at}: {reason(error)}; give a directory"
        ) from error


def check_push(repository: str, is_private: bool) -> str:
    """Whether this machine can push: the name under which the Hub knows its token.

    Raises:
        UserError: offline, no token, one that the Hub does not know or that may not write, no Hub, or a repository that is
            there and public where a private one is asked for.
    """
    from huggingface_hub import HfApi, constants, errors, get_token

    asked = f"hub.push {repository}"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{asked}: HF_HUB_OFFLINE is set, so that nothing can be pushed; unset it, or hub.push")
    token = get_token()
    if not token:
        raise UserError(f"{asked}: there is no token; put one that may write into HF_TOKEN, or run `hf auth login`")
    try:
        with activity("asking the Hub who we are"):
            known = HfApi().whoami(token=token)
    except errors.HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in (401, 403):
            raise UserError(
                f"{asked}: the Hub ({constants.ENDPOINT}) does not answer: {reason(error)}; try again"
            ) from error
        raise UserError(f"{asked}: the Hub ({constants.ENDPOINT}) does not know this token; make a new one there") from error
    except Exception as error:
        raise UserError(
            f"{asked}: the Hub ({constants.ENDPOINT}) cannot be reached: {reason(error)}; where there is no network, leave "
            "hub.push out and push hf/ from elsewhere"
        ) from error
    if ((known.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise UserError(f"{asked}: this token may only read; make one that may write")
    with contextlib.suppress(errors.HfHubHTTPError):  # there is none, or the push will say what is wrong
        if is_private and HfApi().model_info(repository, token=token).private is False:
            raise UserError(
                f"{asked}: that repository is there and public, and hub.private is true; set hub.private to false, or name "
                "another one"
            )
    return str(known.get("name"))


def push(
    directory: Path,
    repository: str,
    is_private: bool,
    revision: str | None,
    message: str,
    replaced: Mapping[str, bytes] | None = None,
) -> str:
    """Push every file of a directory as one commit; the address of the repository, which is made where it is not there.

    Weights, their index and an adapter's settings that the repository has and the directory has not are deleted there: with
    what is pushed they would make another model.

    Args:
        replaced: files that are pushed with other contents than those of the directory.
        revision: a branch, made where it is not there; None: `main`.

    Raises:
        UserError: the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    try:
        with activity(f"pushing {directory.name} to {repository}"), _without_bars():
            api = HfApi()
            address = api.create_repo(repository, private=is_private, exist_ok=True)
            if revision is not None:
                api.create_branch(repository, branch=revision, exist_ok=True)
            with _replacing(directory, replaced or {}) as folder:
                api.upload_folder(
                    repo_id=repository,
                    folder_path=folder,
                    revision=revision,
                    commit_message=message,
                    delete_patterns=list(OF_A_MODEL),
                )
    except Exception as error:
        raise UserError(f"{directory} was not pushed to {repository}: {reason(error)}") from error
    return str(address)


@contextlib.contextmanager
def _replacing(directory: Path, replaced: Mapping[str, bytes]) -> Iterator[Path]:
    """A directory of links to the files of another, but for those that have other contents."""
    with tempfile.TemporaryDirectory(prefix="megadpo-push-") as temporary:
        folder = Path(temporary)
        for path in (path for path in directory.rglob("*") if path.is_file()):
            link = folder / path.relative_to(directory)
            link.parent.mkdir(parents=True, exist_ok=True)
            contents = replaced.get(path.relative_to(directory).as_posix())
            link.symlink_to(path.absolute()) if contents is None else link.write_bytes(contents)
        yield folder


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Within, huggingface_hub draws no bars of its own: every rank would."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()
