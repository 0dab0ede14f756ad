"""Rows that are read, drawn and tokenised as they are asked for, pass after pass, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megadpo.config.given import dataset_kind
from megadpo.config.sources import Source
from megadpo.data.rows.buffer import Place, ShuffleBuffer
from megadpo.data.rows.dataset import LocatedRow, TokeniseJob, process_rows, unseen
from megadpo.data.rows.formats import recognise
from megadpo.data.rows.report import DataReport
from megadpo.data.rows.row_files import Fields, Skip, is_list
from megadpo.data.rows.sources import iter_rows, source_files
from megadpo.data.rows.tokenise import load_tokenizer
from megadpo.data.store import GroupColumns, GroupStore
from megadpo.errors import UserError

MOST_AT_ONCE = 1000
"""Rows that are tokenised together."""

FoundRow = tuple[int, int, str, Fields]  # row number, source number, location, fields


@dataclass(frozen=True)
class Position:
    """Where a stream is. As JSON it goes into checkpoints; rows do not.

    Attributes:
        num_passes: passes over the sources that are done.
        place: how far the next one is.
        num_kept: groups made of the rows drawn in it.
        report: what became of all rows so far.
    """

    num_passes: int = 0
    place: Place = field(default_factory=Place)
    num_kept: int = 0
    report: DataReport = field(default_factory=DataReport)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @staticmethod
    def of(values: Mapping[str, Any]) -> Position:
        """What `to_dict` has made.

        Raises:
            KeyError, TypeError, ValueError: it is nothing of that kind.
        """
        place, report = Place(**values["place"]), DataReport(**values["report"])
        counts = [values["num_passes"], values["num_kept"], place.num_drawn, place.num_read]
        counts += [value for name, value in asdict(report).items() if name.startswith("num_")]
        if not all(type(count) is int and count >= 0 for count in counts) or place.num_drawn > place.num_read:
            raise ValueError(f"{counts} are not the counts of a stream")
        return Position(values["num_passes"], place, values["num_kept"], report)


@dataclass(frozen=True)
class StreamOptions:
    """How rows become a stream of groups.

    Attributes:
        sources: each is read a whole number of times a pass, its weight.
        buffer_size: rows of which the next one is drawn; 1 keeps their order.
        seed: of the drawing.
    """

    sources: Sequence[Source]
    job: TokeniseJob
    buffer_size: int
    seed: int


class GroupStream:
    """Groups in the order of a stream, from a position on; pure but for what is on the disk."""

    def __init__(self, options: StreamOptions, position: Position | None = None) -> None:
        self._options = options
        self._tokenizer = load_tokenizer(options.job.tokenizer_path, options.job.chat_template)
        self.position = position or Position(report=DataReport(kind=options.job.reading.kind))
        self._rows: ShuffleBuffer[FoundRow] | None = None

    def next_groups(self, count: int) -> GroupStore:
        """The next `count` groups; the stream goes on after them, in the next pass where one ends.

        Raises:
            UserError: a row cannot be read, or no row of a whole pass is left.
        """
        options, parts, missing = self._options, [GroupColumns.of([])], count
        while missing:
            chunk = self._draw(min(missing, MOST_AT_ONCE))
            if not chunk:
                self._begin_next_pass()
                continue
            columns, report, _ = process_rows(chunk, options.job, self._tokenizer, unseen)
            report.add(self.position.report)
            assert self._rows is not None
            num_kept = self.position.num_kept + len(columns.rows_G)
            self.position = replace(self.position, place=self._rows.place, num_kept=num_kept, report=report)
            parts.append(columns)
            missing -= len(columns.rows_G)
        return GroupStore(GroupColumns.concatenate(parts), [source.name for source in options.sources])

    def _draw(self, most: int) -> list[LocatedRow]:
        """The next rows of this pass; none at its end."""
        job = self._options.job
        if self._rows is None:
            self._rows = self._open_pass()
        drawn = []
        for number, source, location, fields in self._rows:
            drawn.append((number, source, location, recognise(fields, location, job.reading, job.allow_no_prompt)))
            if len(drawn) == most:
                break
        return drawn

    def _open_pass(self) -> ShuffleBuffer[FoundRow]:
        options, number = self._options, self.position.num_passes
        for source in options.sources:
            if dataset_kind(source.path) == "IterableDataset":
                source.path.set_epoch(number)  # one that its user shuffles has another order in each pass
        return ShuffleBuffer(self._read, options.buffer_size, options.seed, number, self.position.place)

    def _begin_next_pass(self) -> None:
        self.position.report.check([source.name for source in self._options.sources])
        if not self.position.num_kept:
            raise UserError("data: no row of a whole pass over data.train is left; look at what was left out")
        self.position = replace(self.position, num_passes=self.position.num_passes + 1, place=Place(), num_kept=0)
        self._rows = None

    def _read(self, first: int) -> Iterator[tuple[int, FoundRow]]:
        """The rows of a pass from number `first` on."""
        skip, number = Skip(first), first
        for source_number, source in enumerate(self._options.sources):
            for _ in range(int(source.weight)):
                for location, fields in iter_rows(source, skip, streamed=True):
                    yield number, (number, source_number, location, fields)
                    number += 1


def check_streamable(sources: Sequence[Source]) -> None:
    """Refuse sources that cannot be streamed as their options say.

    Raises:
        UserError: naming the source.
    """
    for source in sources:
        if source.weight != int(source.weight):
            raise UserError(
                f"data.train: {source.name} has weight {source.weight:g}, but data.streaming reads a source a whole number "
                "of times; give it 1 or more, or set data.streaming to false"
            )
        for file in source_files(source) or []:
            if is_list(file):
                raise UserError(
                    f"data.train: {file} is one list, which can only be read as a whole; write a row a line (.jsonl), "
                    "or set data.streaming to false"
                )
        if getattr(source.path, "_distributed", None) is not None:
            raise UserError(
                "data.train was split by split_dataset_by_node, so that each process would train on other rows; give the "
                "dataset as it was: a step's pairs are shared out here"
            )
