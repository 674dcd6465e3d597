"""What is kept is made again if it is not as it was kept."""

from __future__ import annotations

import logging

import pytest

from earlyexit.runs.kept import verified


@pytest.mark.parametrize("folder", [False, True])
def test_a_damaged_entry_is_made_again_and_said(tmp_path, caplog, folder):
    makes = []

    @verified
    def keep(name):
        path = tmp_path / name
        if not path.exists():
            makes.append(name)
            if folder:
                path.mkdir()
            (path / "a.txt" if folder else path).write_text("whole")
        return path

    assert keep("x") == keep("x") and makes == ["x"] and not caplog.records
    file = tmp_path / "x" / "a.txt" if folder else tmp_path / "x"
    for damaged in ("whale", "", "whole, and more"):
        file.write_text(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert keep("x") == tmp_path / "x" and file.read_text() == "whole"
        assert caplog.messages == ["x is not as it was kept, and is made again"]
        assert keep("x") and len(caplog.messages) == 1
    assert makes == ["x"] * 4
