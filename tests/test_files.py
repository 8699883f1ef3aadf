"""Files and folders that are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuclip_scale.files import is_occupied, new_folder, write_text


def test_what_cannot_be_written_is_named_as_the_user_named_it(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path, kind in ((tmp_path / "folder", IsADirectoryError), (Path("/proc/numbers.json"), FileNotFoundError)):
        with pytest.raises(kind) as raised:
            write_text(path, "x")
        assert raised.value.filename == str(path)
        assert raised.value.filename2 is None
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_a_new_folder_is_filled_at_its_end_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def half(folder: Path) -> None:
        (folder / "half").touch()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), new_folder(out) as folder:
        half(folder)
    assert not is_occupied(out)
    (out / ".unfinished").mkdir()  # as a kill leaves it
    (out / ".unfinished" / "half").touch()
    assert not is_occupied(out)
    with new_folder(out) as folder:
        (folder / "whole").write_text("x")
        assert not (out / "whole").exists()
    assert [path.name for path in out.iterdir()] == ["whole"]
    assert is_occupied(out)
    assert is_occupied(out / "whole"), "a file"
    assert not is_occupied(tmp_path / "new")
