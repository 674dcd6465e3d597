"""Small trainings of every kind of model still give the numbers of an earlier commit.

``reference_numbers.py`` prints digests, which hold on one machine only; its perplexities hold on any.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from earlyexit.runs.paths import PACKAGE

HERE = Path(__file__).parent
REFERENCE = json.loads((HERE / "reference_numbers.json").read_text())


@pytest.mark.slow
def test_every_kind_of_model_trains_and_exits_as_before():
    run = subprocess.run(
        [sys.executable, HERE / "reference_numbers.py"],
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    lines = [line.split("\t") for line in run.stdout.splitlines()]
    found = {name: float(values[-1]) for name, *values in lines if name.endswith("/evaluated")}
    assert found == pytest.approx(REFERENCE["perplexity"], rel=1e-3)
