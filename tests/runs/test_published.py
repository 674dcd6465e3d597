"""What is published is whole, says which version made it, and if that is this one, is fresh."""

from __future__ import annotations

import re

import pytest

from earlyexit.runs import freshness, runner
from earlyexit.runs.paths import project
from earlyexit.runs.profiles import PROFILES
from earlyexit.runs.publish import QUOTED
from earlyexit.runs.settings import Settings

PLACE = project()
RECORDS = freshness.all_published(PLACE)
NAMES = [f"{record.label}/{record.notebook}" for record in RECORDS]


def test_every_record_can_be_read_and_every_file_is_listed_once():
    paths = {p.relative_to(PLACE.root).as_posix() for p in PLACE.results.glob("*/*.run.json")}
    assert paths == {f"results/{name}.run.json" for name in NAMES}
    listed = [name for record in RECORDS for name in record.files]
    assert len(listed) == len(set(listed))
    tops = (PLACE.results, PLACE.figures)
    there = {p.relative_to(PLACE.root).as_posix() for top in tops for p in top.glob("*/*.*")}
    ignored = re.compile("(results|figures)/smoke")  # not published
    assert {name for name in there - paths if not ignored.match(name)} == set(listed)


@pytest.mark.parametrize("record", RECORDS, ids=NAMES)
def test_a_published_result_is_whole(record):
    assert record.unmatched(PLACE.root) == []


def test_published_results_are_fresh_and_from_a_clean_tree():
    """Of this version; what an earlier one made is waiting to be made anew."""
    current = {(r.label, r.notebook): r for r in RECORDS if not r.is_old}
    assert [key for key, record in current.items() if record.dirty is not False] == []
    for label in {label for label, _ in current} & set(PROFILES):
        steps = runner.plan(Settings(label, data_dir=None)).steps
        stale = {s.notebook: s.reasons for s in steps if (label, s.notebook) in current}
        assert not any(stale.values()), (label, stale)


def test_the_readme_says_what_an_earlier_version_made():
    lines = PLACE.readme.read_text("utf-8").splitlines()
    for label in {record.label for record in RECORDS if record.is_old}:
        assert label in QUOTED
        (row,) = (line for line in lines if line.startswith(f"| {label} | "))
        assert "an earlier version" in row
