"""The README's numbers are those of the results."""

from __future__ import annotations

import re
import shlex

import pytest
from tiny_project import write_project

from earlyexit.__main__ import main
from earlyexit.runs import publish as readme
from earlyexit.runs.artifacts import MissingResult
from earlyexit.runs.paths import project


def test_the_readme_quotes_the_results_that_are_here():
    assert readme.check(project().readme) == []


def test_blocks_are_rewritten_and_the_rest_is_not(tmp_path, monkeypatch):
    path = write_project(tmp_path) / "README.md"
    path.write_text("a\n<!-- generated: twice -->\nold\n<!-- end -->\nb 3.5\n")
    monkeypatch.setitem(readme.BLOCKS, "twice", lambda root: "| 1 |")
    assert readme.check(path, tmp_path) == ["twice"]
    assert readme.update(path, tmp_path) == ["twice"]
    assert path.read_text() == "a\n<!-- generated: twice -->\n| 1 |\n<!-- end -->\nb 3.5\n"
    assert readme.update(path, tmp_path) == []


def test_a_block_without_results_says_how_to_make_them(tmp_path, monkeypatch):
    def block(root):
        raise MissingResult("results/cpu/x.csv is missing: run `this`")

    path = tmp_path / "README.md"
    path.write_text("<!-- generated: gone -->\n<!-- end -->\n")
    monkeypatch.setitem(readme.BLOCKS, "gone", block)
    readme.update(path, tmp_path)
    assert "*Results are missing: results/cpu/x.csv is missing: run `this`.*" in path.read_text()
    path.write_text("<!-- generated: misspelt -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="'misspelt' is unknown; there are"):
        readme.check(path, tmp_path)


def test_the_status_block_names_profiles_without_results(tmp_path):
    text = readme.status_block(tmp_path)
    assert "| cpu | none yet: `python -m earlyexit run --profile cpu` |" in text
    assert "smoke" not in text


@pytest.mark.slow
def test_the_commands_it_shows_are_accepted():
    """Those that run notebooks, as they stand, up to the point where work would begin."""
    lines = re.findall(r"python -m earlyexit (run[^`#\n]*)", project().readme.read_text("utf-8"))
    assert len(lines) >= 5
    for line in lines:
        arguments = [a for a in shlex.split(line) if a != "--dry-run"]
        if "DIR" in arguments:  # the reader's own folder
            arguments[arguments.index("DIR")] = str(project().root)
        assert main([*arguments, "--dry-run"]) == 0, line
