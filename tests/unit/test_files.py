"""What is made on disk: whole files or none, directories or one sentence; reasons of exceptions."""

from pathlib import Path

import pytest

from megadpo.errors import UserError, first_line, reason
from megadpo.files import make_directory, make_writable_directory, replacing


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text in ("first", "second"):
        with replacing(path) as partial:
            partial.write_text(text)
            assert partial.parent == tmp_path and partial != path
        assert path.read_text() == text
    with pytest.raises(KeyError), replacing(path) as partial:
        partial.write_text("third")
        raise KeyError
    assert path.read_text() == "second" and list(tmp_path.iterdir()) == [path]


def test_what_failed_inside_is_told_where_no_file_could_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyError), replacing(tmp_path / "file" / "below"):
        raise KeyError


@pytest.mark.parametrize("make", [make_directory, make_writable_directory])
def test_a_directory_is_made_with_those_above_it_or_refused_with_the_option(tmp_path: Path, make) -> None:
    for _ in range(2):
        make(tmp_path / "a" / "b", "output_dir")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^output_dir: .*file/below cannot be made: Not a directory$"):
        make(tmp_path / "file" / "below", "output_dir")


def test_a_reason_is_one_line_that_says_something() -> None:
    error = ValueError("two\n   lines " + "x" * 300)
    assert reason(error) == ("two lines " + "x" * 300)[:200]
    assert reason(error, limit=None) == "two lines " + "x" * 300
    assert first_line(error) == "two"
    assert (reason(KeyError()), first_line(ValueError(" \n"))) == ("KeyError", "ValueError")
