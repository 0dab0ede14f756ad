"""Patches of other libraries end with their scope."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megadpo.platform.patches import patch, patches_undone, when_undone


def test_what_was_patched_is_put_back_also_after_an_error():
    library = SimpleNamespace(name="theirs", other="theirs")
    with pytest.raises(ZeroDivisionError), patches_undone():
        patch(library, "name", "first")
        patch(library, "name", "second")
        with patches_undone():
            patch(library, "other", "inner")
            assert (library.name, library.other) == ("second", "inner")
        assert library.other == "theirs"
        raise ZeroDivisionError
    assert vars(library) == {"name": "theirs", "other": "theirs"}


def test_a_scope_leaves_what_was_patched_before_it():
    library = SimpleNamespace(name="theirs")
    patch(library, "name", "ours")
    with patches_undone():
        patch(library, "name", "ours")
    assert library.name == "ours"


def test_what_waits_for_the_end_is_called_there_but_not_after_an_error():
    called = []
    with patches_undone():
        when_undone(lambda: called.append("inner"))
        assert not called
    assert called == ["inner"]
    with pytest.raises(ZeroDivisionError, match="of it"), patches_undone():
        when_undone(lambda: called.append("after"))
        raise ZeroDivisionError("the reason of it")
    assert called == ["inner"]
    with pytest.raises(IndexError), patches_undone():
        when_undone(lambda: called[5])
