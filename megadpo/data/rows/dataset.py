"""From sources to groups: every row is read, recognised, tokenised and truncated once, in parallel, and cached on disk."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from megadpo.config.sources import Source, parse_sources
from megadpo.console.activity import activity
from megadpo.data.groups import Group
from megadpo.data.rows.cache_key import cache_key
from megadpo.data.rows.count import cheap_count
from megadpo.data.rows.formats import PAIRS, Reading, recognise
from megadpo.data.rows.report import DataReport
from megadpo.data.rows.row import Row
from megadpo.data.rows.sources import iter_rows, source_files, split_taken
from megadpo.data.rows.templates import read_template
from megadpo.data.rows.tokenise import TRUNCATIONS, GroupTokens, last_turn_lengths, load_tokenizer, tokenise_rows, truncate
from megadpo.data.store import GroupColumns, GroupStore, read_about
from megadpo.errors import UserError, reason
from megadpo.files import cannot_be_used, expanded, put_away
from megadpo.platform.workers import WorkerDiedError, in_workers

# Workers take seconds to start: fewer rows than this are tokenised faster in this process.
MIN_ROWS_FOR_WORKERS = 2000
_CHUNK = 250

CACHE_SETTING = "data.cache_dir"

LocatedRow = tuple[int, int, str, Row]  # row number, source number, location, row
Seen = TypeVar("Seen")
Result = TypeVar("Result")


class DataOptions(Protocol):
    """The options of the `data` section that rows are read and tokenised by."""

    max_length: int | None
    truncation: str
    chat_template: str | None
    columns: dict[str, str]
    ignore_columns: list[str]
    allow_no_prompt: bool
    num_workers: int | None
    cache_dir: str | None


@dataclass(frozen=True)
class Prepared:
    """What `prepare_groups` returns."""

    groups: GroupStore
    report: DataReport


@dataclass(frozen=True)
class TokeniseJob:
    """What `make_groups` needs besides the rows. Small, because it is sent to every worker."""

    tokenizer_path: str
    chat_template: str | None
    max_length: int | None
    truncation: str
    reading: Reading = PAIRS
    allow_no_prompt: bool = False


@dataclass(frozen=True)
class RowTokens:
    """A tokenised row before and after `max_length`; a string is the reason why it is dropped there."""

    whole: GroupTokens | str
    cut: GroupTokens | str


Look = Callable[[Sequence[LocatedRow], Sequence[RowTokens], TokeniseJob, Any], Seen]
"""Called where rows are tokenised, with some of them, their tokens and the tokenizer; what it returns comes back."""


def prepare_groups(
    data: DataOptions,
    sources_value: object,
    tokenizer_path: str,
    reading: Reading = PAIRS,
    held_out: bool = False,
    made: tuple[GroupStore, DataReport] | None = None,
) -> Prepared:
    """Read and tokenise the sources, or load them from the cache. Call it before process groups are made.

    Any number of processes may call it at once: one does the work while the others wait, and then read the cache.

    Args:
        data: the configuration's `data` section.
        sources_value: its `train` or `eval`.
        tokenizer_path: a local directory with a tokenizer that transformers can load.
        reading: what the objective reads of every row.
        held_out: whether rows to evaluate on are meant, of sources with splits.
        made: what `look_through` has made of the same sources: kept in the cache where that has nothing.

    Raises:
        UserError: for anything wrong with the files, the rows, the tokenizer or the options, when no row is left, or
            when labelled answers are all desirable or all undesirable.
    """
    sources, job = tokenise_job(data, sources_value, tokenizer_path, reading, held_out)
    with activity("hashing the rows' files"):
        directory = cache_root(data.cache_dir) / "groups" / cache_key(sources, job)
    cached = _load(directory)
    if cached is None:
        cached = _make_once(directory, sources, job, data.num_workers, made)
    store, report = cached
    names, weights = [source.name for source in sources], [source.weight for source in sources]
    report = replace(report, splits=[line for source in sources if (line := split_taken(source)) is not None])
    return Prepared(GroupStore(store.columns, names, weights, store.digest), report)


def tokenise_job(
    data: DataOptions, sources_value: object, tokenizer_path: str, reading: Reading, held_out: bool = False
) -> tuple[list[Source], TokeniseJob]:
    """The sources, and how their rows are tokenised; arguments and errors as of `prepare_groups`."""
    if data.truncation not in TRUNCATIONS:
        raise UserError(f"data.truncation is {data.truncation!r}; it must be one of {', '.join(TRUNCATIONS)}")
    if data.max_length is not None and data.max_length < 2:
        raise UserError(f"data.max_length is {data.max_length}; a prompt token and a completion token need at least 2")
    if not os.path.isdir(tokenizer_path):
        raise UserError(f"model.path: {tokenizer_path} is not a directory; the tokenizer is read from it")
    sources = parse_sources(sources_value, data.columns, ignored=data.ignore_columns, held_out=held_out)
    template = read_template(data.chat_template)
    job = TokeniseJob(tokenizer_path, template, data.max_length, data.truncation, reading, data.allow_no_prompt)
    return sources, job


def look_at(data: DataOptions, sources_value: object, reading: Reading = PAIRS, held_out: bool = False) -> None:
    """Whether the sources, their first rows and the chat template can be read: what costs minutes begins after this.

    Args: as of `prepare_groups`.

    Raises:
        UserError: they cannot.
    """
    read_template(data.chat_template)
    for source in parse_sources(sources_value, data.columns, ignored=data.ignore_columns, held_out=held_out):
        files = source_files(source)
        # A list is read as a whole, and a dataset may have to be fetched: their rows are looked at in their turn.
        if files is None or files[0].name.removesuffix(".gz").endswith(".json"):
            continue
        for location, row in islice(iter_rows(source), 1):
            recognise(row, location, reading, data.allow_no_prompt)


def cache_root(cache_dir: str | None) -> Path:
    """`data.cache_dir`, else $MEGADPO_CACHE, else ~/.cache/megadpo."""
    return expanded(cache_dir or os.environ.get("MEGADPO_CACHE") or "~/.cache/megadpo", "data.cache_dir")


def _make_once(
    directory: Path,
    sources: list[Source],
    job: TokeniseJob,
    num_workers: int | None,
    made: tuple[GroupStore, DataReport] | None = None,
) -> tuple[GroupStore, DataReport]:
    """Make what is not in the cache, or is damaged there, while others that want it wait."""
    from filelock import FileLock

    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            with activity("waiting for another process, which tokenises these rows"):
                stack.enter_context(FileLock(f"{directory}.lock", mode=0o666))
            cached = _load(
                directory, says_damage=True
            )  # one of those that wait finds it so; the others read what that makes
            if cached is not None:
                return cached
            put_away(directory)
            store, report = made or make_groups(sources, job, num_workers)
            with activity("writing the token cache"):
                store.save(directory, extra=report.to_dict())
    except KeyboardInterrupt:
        names = ", ".join(source.name for source in sources)
        raise KeyboardInterrupt(
            f"while {names} was tokenised: of that nothing was kept, what was tokenised before is in {directory.parent}; "
            "the same command goes on there"
        ) from None
    except OSError as error:
        raise UserError(cannot_be_used(CACHE_SETTING, directory.parent, error)) from error
    loaded = _load(directory)
    if loaded is None:
        raise UserError(f"data.cache_dir: {directory} is not what was just written to it; is the disk sound?")
    return loaded


def _load(directory: Path, says_damage: bool = False) -> tuple[GroupStore, DataReport] | None:
    """What is in the cache; None where there is nothing, or something damaged.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if not os.path.lexists(directory):
            return None
        return GroupStore.load(directory), DataReport(**read_about(directory)["extra"])
    except PermissionError as error:
        raise UserError(cannot_be_used(CACHE_SETTING, directory, error)) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if says_damage:
            print(f"megadpo: the token cache {directory} is damaged ({reason(error)}): it is made again", file=sys.stderr)
        return None


def make_groups(sources: Sequence[Source], job: TokeniseJob, num_workers: int | None) -> tuple[GroupStore, DataReport]:
    """Tokenise every row of the sources, without the cache; raises what `prepare_groups` raises."""
    store, report, _ = look_through(sources, job, num_workers, unseen)
    report.check([source.name for source in sources])
    return store, report


def look_through(
    sources: Sequence[Source], job: TokeniseJob, num_workers: int | None, look: Look[Seen]
) -> tuple[GroupStore, DataReport, list[Seen]]:
    """What `make_groups` makes, without its last check, and what `look` saw of every row on the way.

    Args:
        look: a module's function: it is called where the rows are tokenised, which may be another process.
    """
    rows = _located_rows(sources, job)
    head = list(islice(rows, MIN_ROWS_FOR_WORKERS))
    num_workers = (os.cpu_count() or 1) if num_workers is None else num_workers
    chunks, process = _chunks(chain(head, rows)), partial(process_rows, look=look)
    if num_workers <= 1 or len(head) < MIN_ROWS_FOR_WORKERS:
        with activity("loading the tokenizer"):
            tokenizer = load_tokenizer(job.tokenizer_path, job.chat_template)
        results = (process(chunk, job, tokenizer) for chunk in chunks)
    else:
        results = _in_workers(chunks, job, num_workers, process)
    report = DataReport(kind=job.reading.kind)
    parts, seen = [GroupColumns.of([])], []
    # Whose workers end with it
    with activity("tokenising", cheap_count(sources), "rows") as tokenising, contextlib.closing(results):
        for columns, part, seen_of_chunk in results:
            tokenising.advance(part.num_rows)
            parts.append(columns)
            report.add(part)
            seen.append(seen_of_chunk)
    return GroupStore(GroupColumns.concatenate(parts), [source.name for source in sources]), report, seen


def unseen(chunk: Sequence[LocatedRow], tokens: Sequence[RowTokens], job: TokeniseJob, tokenizer: Any) -> None:
    """The look of those who only want groups."""


def _located_rows(sources: Sequence[Source], job: TokeniseJob) -> Iterator[LocatedRow]:
    number = 0
    for source_number, source in enumerate(sources):
        for location, row in iter_rows(source):
            yield number, source_number, location, recognise(row, location, job.reading, job.allow_no_prompt)
            number += 1


def _chunks(rows: Iterator[LocatedRow]) -> Iterator[list[LocatedRow]]:
    while chunk := list(islice(rows, _CHUNK)):
        yield chunk


def process_rows(
    chunk: list[LocatedRow], job: TokeniseJob, tokenizer: Any, look: Look[Seen]
) -> tuple[GroupColumns, DataReport, Seen]:
    """The groups of some rows, what became of them, and what `look` saw."""
    report = DataReport(kind=job.reading.kind, num_rows=len(chunk))
    report.unread = dict(Counter(name for *_, row in chunk for name in row.unread))
    dropped: Counter[str] = Counter()
    groups, group_sources = [], []
    tokenised = _tokens_of(chunk, job, tokenizer)
    for (number, source, _, row), row_tokens in zip(chunk, tokenised, strict=True):
        tokens = row_tokens.cut
        if isinstance(tokens, str):
            dropped[tokens] += 1
            continue
        prompts, responses = (tuple(np.array(ids, np.int32) for ids in side) for side in (tokens.prompts, tokens.responses))
        groups.append(Group(prompts, responses, number, row.row_values))
        group_sources.append(source)
        report.num_unshared += len(prompts) > 1
        report.num_truncated += tokens.truncated
        report.num_cut_prompts += tokens.cut_prompt
        report.num_cut_answers += tokens.cut_answer
        report.num_implicit_prompts += row.implicit_prompt and not row.has_empty_prompt
        report.num_empty_prompts += row.has_empty_prompt and job.reading.kind != "examples"
        report.num_moved_boundaries += tokens.moved_boundary
        report.num_desirable += row.row_values.get("label", ()).count(1.0)
        report.num_undesirable += row.row_values.get("label", ()).count(0.0)
    report = replace(report, num_kept=len(groups), dropped=dict(dropped))
    return GroupColumns.of(groups, group_sources), report, look(chunk, tokenised, job, tokenizer)


def _tokens_of(chunk: Sequence[LocatedRow], job: TokeniseJob, tokenizer: Any) -> list[RowTokens]:
    tokenised = []
    wholes = tokenise_rows([(location, row) for _, _, location, row in chunk], tokenizer)
    for (_, _, location, row), whole in zip(chunk, wholes, strict=True):
        cut = whole if isinstance(whole, str) else _truncate(row, whole, job, tokenizer, location)
        tokenised.append(RowTokens(whole, cut))
    return tokenised


def _truncate(row: Row, tokens: GroupTokens, job: TokeniseJob, tokenizer: Any, location: str) -> GroupTokens | str:
    protected = [1]
    if job.truncation == "prompt_left" and job.max_length is not None:
        longest = max(len(prompt) + len(response) for prompt, response in tokens.sequences())
        if longest > job.max_length:
            protected = last_turn_lengths(row, tokens, tokenizer, location)
    return truncate(tokens, job.max_length, job.truncation, protected)


def _in_workers(
    chunks: Iterator[list[LocatedRow]], job: TokeniseJob, num_workers: int, process: Callable[..., Result]
) -> Generator[Result, None, None]:
    """Results in the chunks' order. However this ends, the workers have ended."""
    with activity("loading the tokenizer"):
        begin = partial(_begin_worker, _for_workers(load_tokenizer(job.tokenizer_path, job.chat_template)), job, process)
    try:
        with contextlib.closing(in_workers(begin, chunks, num_workers)) as results:
            with activity(f"starting {num_workers} processes that tokenise"):
                first = list(islice(results, 1))
            yield from chain(first, results)
    except WorkerDiedError as error:
        raise UserError(
            "data: a tokenisation worker died, perhaps for lack of memory; set data.num_workers lower"
        ) from error


def _for_workers(tokenizer: Any) -> Any:
    """A tokenizer of the tokenizers library, which the workers are sent: to load one, they would have to import torch, in
    three times the seconds and memory. None: they load it."""
    from transformers import PreTrainedTokenizerFast

    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerFast) else None


def _begin_worker(tokenizer: Any, job: TokeniseJob, process: Callable[..., Result]) -> Callable[..., Result]:
    """What every worker calls with a chunk."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    loaded = tokenizer if tokenizer is not None else load_tokenizer(job.tokenizer_path, job.chat_template)
    return partial(process, job=job, tokenizer=loaded)
