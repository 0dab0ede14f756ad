"""What is never shown: passwords, tokens and keys in texts that go to a terminal, a log, a file or a tracker.

Known by three marks: where they stand (user and password of a URL, a parameter such as `?token=…`, a header), what they look
like (Hugging Face, W&B, GitHub, AWS and other tokens have a form of their own), and that a variable of the environment with
a name such as `HF_TOKEN` or `WANDB_API_KEY` has them as its value. A password that has none of these marks cannot be known.
"""

from __future__ import annotations

import functools
import glob
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

HIDDEN = "***"
LEAST_CHARACTERS = 8
"""Of a variable's value: shorter ones are words of the language as well."""
_SECRET_WORDS = {"token", "secret", "password", "passwd", "passphrase", "pass", "key", "apikey", "credential", "credentials"}
_SECRET_WORDS |= {"jwt", "pat", "cookie", "bearer", "authorization", "signature", "sig"}
_SECRET_ENDINGS = ("password", "passwd", "token", "secret", "apikey")
"""Of words that are written together: PGPASSWORD, HFTOKEN."""
_WORDS_OF_NO_SECRET = {"name", "type", "dir", "path", "file", "url", "uri", "id"}
"""As the last word of a name: it says where a secret is, or which."""
_NAME = r"[\w.-]*(?:token|secret|passw(?:or)?d|passphrase|api[_-]?key|access[_-]?key|private[_-]?key|credentials?)"
_FORMS = (
    r"hf_[A-Za-z0-9]{34,}",
    r"wandb_v\d_[A-Za-z0-9_]{16,}",
    # A long run of letters and digits, or what makers of such keys put first: sk-learn-preference-dataset is a directory.
    r"(?:sk|pk)-(?=[\w-]*?(?<![A-Za-z0-9])(?=[A-Za-z]*\d)[A-Za-z0-9]{20,})[\w-]+",
    r"sk-(?:proj|svcacct|admin|ant-[a-z]+\d\d)-(?=[\w-]*\d)[\w-]{40,}",
    r"(?:sk|pk)-lf-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    r"gh[opsur]_[A-Za-z0-9]{20,}",
    r"github_pat_\w{20,}",
    r"glpat-[\w-]{16,}",
    r"xox[abeoprs]-[\w-]{10,}",
    r"(?:AKIA|ASIA)[A-Z0-9]{16}",
    r"AIza[\w-]{30,}",
    r"nvapi-[\w-]{20,}",
    r"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",
)
_IN_URLS: tuple[tuple[re.Pattern[str], str], ...] = (
    # scheme://user:password@host, also where the password has an @ of its own
    (re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#'\"<>]*@"), rf"\1{HIDDEN}@"),
    # ?token=…, &X-Amz-Signature=…
    (
        re.compile(
            rf"([?&;](?:{_NAME}|[\w.-]*(?:signature|credential|auth)|sig|key|code|pwd)=)[^\s&;#'\"<>]+", re.IGNORECASE
        ),
        rf"\1{HIDDEN}",
    ),
)
_PLACES: tuple[tuple[re.Pattern[str], str], ...] = (
    *_IN_URLS,
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{8,}"), rf"\1 {HIDDEN}"),
    (re.compile(r"((?:x-)?(?:api-key|auth-token)['\"]?\s*[:=]\s*['\"]?)[^\s'\",;]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    # The whole block, or what there is of it
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), HIDDEN),
    (re.compile(r"((?:Account|SharedAccess)Key=)[^\s;'\"]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    # HF_TOKEN=…, HF_TOKEN: …, --password=…, api_key: …; not pad_token: …, which is no secret
    (re.compile(r"(\b[A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|PASSWD|_KEY|APIKEY)=['\"]?)[^\s'\",;&]+"), rf"\1{HIDDEN}"),
    (
        re.compile(r"(\b[A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|PASSWD|_KEY|APIKEY)['\"]?\s*:\s*['\"]?)[^\s'\",;&]{8,}"),
        rf"\1{HIDDEN}",
    ),
    # --token …, and the same as a list of arguments; not --pad-token …
    (
        re.compile(
            r"(?<![\w-])(--(?!(?:pad|eos|bos|unk|sep|cls|mask|image)[-_])(?:[\w-]*[-_])?(?:token|secret|password|passwd|"
            r"api[-_]?key|(?:access|secret|private)[-_]key)['\"]?(?:\s*=\s*|,?\s+)['\"]?)(?!-)[^\s'\",;]{8,}",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    # A key of W&B's older form, 40 hexadecimal digits as a commit has them, where a word says what it is
    (
        re.compile(r"(\b(?:wandb|login|\w*key|\w*token|secret|password)\W{1,4}(?:is\W{1,3})?)[0-9a-f]{40}\b", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),
    (
        re.compile(
            r"(\b(?:[\w-]*[_-])?(?:password|passwd|api[_-]?key|secret(?:[_-](?:access[_-])?key)?)['\"]?\s*[=:]\s*['\"]?)"
            r"[^\s'\",;&]+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(rf"(?<![A-Za-z0-9_-])(?:{'|'.join(_FORMS)})"), HIDDEN),
)


def redact(text: str, environ: Mapping[str, str] | None = None) -> str:
    """`text` with `***` in the place of every secret.

    Args:
        environ: variables whose values are secrets where their names say so; None: this process's.
    """
    return _without(_values_of(os.environ if environ is None else environ), text)


def _without(values: Sequence[str], text: str) -> str:
    for value in values:
        text = text.replace(value, HIDDEN)
    for pattern, hidden in _PLACES:
        text = pattern.sub(hidden, text)
    return text


def redacted(value: Any, name: str = "") -> Any:
    """A value of nested dicts, lists and scalars with `redact` applied to every text in it, and no text under a secret's
    name."""
    return _redacted(value, name, _values_of(os.environ))


def _redacted(value: Any, name: str, values: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _redacted(item, str(key), values) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item, name, values) for item in value]
    if not isinstance(value, str):
        return value
    return HIDDEN if value and is_secret_name(name) else _without(values, value)


def redacted_paths(value: Any) -> Any:
    """As `redacted`, of what names paths (a path, a mapping with a `path`, a list of these, a mapping of these by name) and
    is read again: of one that is here only the credentials of a URL are hidden, whatever it looks like and whatever the
    environment says."""
    if isinstance(value, Mapping) and "path" not in value:
        return {key: redacted_paths(item) for key, item in value.items()}
    if isinstance(value, Mapping):
        return {key: redacted_paths(item) if key == "path" else redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_paths(item) for item in value]
    if not isinstance(value, str) or not _is_here(value):
        return redacted(value)
    for pattern, hidden in _IN_URLS:
        value = pattern.sub(hidden, value)
    return value


def _is_here(path: str) -> bool:
    """Whether a path, or the directory in which a pattern of paths begins, exists."""
    try:
        found = os.path.expandvars(os.path.expanduser(path))
    except ValueError:  # no path at all
        return False
    begin, magic, _ = re.split(r"([*?\[])", found, maxsplit=1) if glob.has_magic(found) else (found, "", "")
    return os.path.exists(found) or (bool(magic) and os.path.isdir(os.path.dirname(begin)))


def redact_exception(error: BaseException) -> None:
    """Redact the messages of an exception, and of those that it came of, in place: a traceback shows them all."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        waiting += [one.__cause__, one.__context__]
        if any(isinstance(item, str) and redact(item) != item for item in one.args):
            one.args = tuple(redact(item) if isinstance(item, str) else item for item in one.args)
        if isinstance(one, OSError):
            for name in ("strerror", "filename", "filename2"):
                if isinstance(value := getattr(one, name), str):
                    setattr(one, name, redact(value))


@functools.lru_cache(maxsize=1024)
def is_secret_name(name: str) -> bool:
    """Whether a variable or field of this name holds a secret: one of its last two words says so, unless the last one says
    that it only tells where the secret is, or which (S3_SECRET_NAME; but AWS_ACCESS_KEY_ID is half of one)."""
    words = [word.lower() for word in re.split(r"[^A-Za-z0-9]+", name) if word]
    if words[-1:] and words[-1] in _WORDS_OF_NO_SECRET and words[-3:] != ["access", "key", "id"]:
        return False
    return any(word in _SECRET_WORDS or word.endswith(_SECRET_ENDINGS) for word in words[-2:])


def _values_of(environ: Mapping[str, str]) -> list[str]:
    """Secrets among the variables' values and in their URLs, as they are and as a URL writes them; longest first."""
    found = set()
    for name, value in environ.items():
        if is_secret_name(name):
            found |= {value, *value.splitlines()}
        elif "://" in value:
            found |= _passwords_of(value)
    found |= {quote(value, safe="") for value in found}
    # A path says where a secret is: it is none.
    found = {value for value in found if len(value) >= LEAST_CHARACTERS and not os.path.exists(value)}
    return sorted(found, key=len, reverse=True)


def _passwords_of(url: str) -> set[str]:
    try:
        password = urlsplit(url).password
    except ValueError:
        return set()
    return set() if password is None else {password}
