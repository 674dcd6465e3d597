"""Parameters of notebooks: bounds, defaults, and the cells that show them."""

from __future__ import annotations

import pytest

from earlyexit.runs.parameters import (
    COMMON,
    NOTEBOOKS,
    as_dict,
    declared,
    names,
    read_parameters,
    saved_otherwise,
)
from earlyexit.runs.paths import project
from earlyexit.runs.profiles import PROFILES

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS)


def test_every_notebook_has_its_parameters_here():
    assert set(NOTEBOOKS) == {path.stem for path in project().notebooks.glob("[0-9]*.ipynb")}


@each_notebook
def test_the_cell_shows_the_defaults(notebook):
    path = project().notebooks / f"{notebook}.ipynb"
    assert declared(path) is NOTEBOOKS[notebook]
    assert saved_otherwise(path) == {}


@pytest.mark.parametrize("profile", PROFILES)
@each_notebook
def test_every_profile_has_valid_parameters_for_every_notebook(profile, notebook):
    parameters = PROFILES[profile].parameters(notebook)
    assert set(as_dict(parameters)) == {*COMMON, *names(NOTEBOOKS[notebook])}


@pytest.mark.parametrize(
    ("notebook", "wrong"),
    [
        ("03_threshold_sweep", {"epsilons": [0.1, 0]}),
        ("03_threshold_sweep", {"epsilons": []}),
        ("03_threshold_sweep", {"recipes": ["joint", "other"]}),
        ("03_threshold_sweep", {"thresholds": [1.1]}),
        ("04_speedup_breakdown", {"panels": [[4, 1, 2]]}),
        ("06_guarantees", {"delta": 1.0}),
        ("06_guarantees", {"criterion": "other"}),
        ("07_combinations", {"keep": 0.0}),
        ("07_combinations", {"sparse_sizes": [[1, 2, 3, 0]]}),
        ("08_study", {"original_threshold": -0.1}),
    ],
)
def test_a_value_outside_its_bounds_is_refused(notebook, wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}"):
        NOTEBOOKS[notebook](**wrong)


def test_what_papermill_injects_is_a_parameter_of_its_type():
    """A notebook's variables hold all that papermill set, and IPython's ``In`` the cell that did."""
    path = project().notebooks / "06_guarantees.ipynb"

    def read(**injected):
        cell = "# Parameters\n" + "".join(f"{k} = {v!r}\n" for k, v in injected.items())
        return read_parameters(path, {"In": ["", "delta: float = 0.05", cell, "x = 1"], **injected})

    assert read(epsilons=[0.03]).epsilons == (0.03,)
    with pytest.raises(ValueError, match=r"06_guarantees has no parameter 'epsilonz'; it has prof"):
        read(epsilonz=[0.03])
    with pytest.raises(ValueError, match=r"^epsilons='\[0.03\]': must be a list$"):
        read(epsilons="[0.03]")
    with pytest.raises(ValueError, match=r"^epsilons=0.03: must be a list$"):
        read(epsilons=0.03)
    with pytest.raises(ValueError, match=r"^epsilons\[0\]=-0.03: must be > 0$"):
        read(epsilons=[-0.03])
    assert read_parameters(path, {"x": 1}) == NOTEBOOKS["06_guarantees"]()  # outside IPython
