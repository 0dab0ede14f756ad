"""Patches of other libraries end with their scope."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megadpo.platform.patches import patch, patches_undone


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
