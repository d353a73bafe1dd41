"""Verification: verdicts of items, what catches a fault, the table, JSON and Dataset, and the command."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from mfsde import cli
from mfsde.analysis.check import identity, inequality, unfounded
from mfsde.verification import catalogue, report
from mfsde.verification import verify as verification
from mfsde.verification.item import Finding, Item, Result, claim, item, measured, misprint, outside

HOLDING, FAILING = identity("equal", 1.0, 1.0), identity("unequal", 1.0, 2.0)
WITHOUT = unfounded("elsewhere", "the hypothesis was broken")


def made(*findings: Finding, error: type[Exception] | None = None) -> Item:
    @item(source="001, nowhere", statement="1 = 1", fault="1 = 2")
    def tried(quick, faulty):
        yield from findings
        if error:
            raise error("a reason")

    return tried


@pytest.mark.parametrize(
    ("findings", "verdict"),
    [
        ([claim(HOLDING)], "holds"),
        ([claim(HOLDING), misprint(FAILING), outside(WITHOUT)], "holds"),
        ([claim(HOLDING), claim(FAILING)], "violated"),
        ([claim(HOLDING), claim(WITHOUT)], "hypothesis fails"),
        ([claim(FAILING), claim(WITHOUT)], "violated"),
        # A misprint that is true, and a hypothesis whose failure went unseen.
        ([claim(HOLDING), misprint(HOLDING)], "violated"),
        ([claim(HOLDING), outside(HOLDING)], "violated"),
        ([], "error"),
    ],
)
def test_an_item_holds_where_every_check_gets_the_verdict_it_must_have(findings, verdict):
    assert measured(made(*findings), quick=True, faulty=False).verdict == verdict


def test_what_is_raised_is_a_verdict_and_keeps_what_was_found_before():
    result = measured(made(claim(HOLDING), error=RuntimeError), quick=True, faulty=False)
    assert (result.verdict, result.error, len(result.findings)) == ("error", "RuntimeError: a reason", 1)


def test_a_fault_is_caught_by_a_claim_alone():
    def caught(*findings):
        return measured(made(*findings), quick=True, faulty=True).caught

    assert caught(claim(HOLDING), claim(FAILING))
    assert not caught(claim(HOLDING), misprint(FAILING), outside(FAILING), claim(WITHOUT))


def test_a_claim_without_a_number_does_not_hold():
    nothing = replace(HOLDING, margin=math.nan)
    assert measured(made(claim(nothing)), quick=True, faulty=False).verdict == "violated"


def test_the_interval_is_three_standard_errors_and_the_declared_error():
    check = identity("x", 2.0, 2.1, stderr=0.1, discretisation=0.05)
    assert claim(check).interval == pytest.approx((1.65, 2.35))


# The catalogue


def test_every_item_says_what_it_needs_and_how_it_may_fail():
    found = catalogue.items()
    assert len(found) >= 40
    for what in found.values():
        assert what.document in catalogue.DOCUMENTS, what.name
        assert what.statement, what.name
        assert what.fault, what.name
        assert what.name == what.name.lower().replace("_", "-")


def test_items_are_chosen_by_name_and_by_document():
    known = catalogue.items()
    first = next(iter(known))
    assert [what.name for what in catalogue.chosen([first, first])] == [first]
    of_001 = [name for name, what in known.items() if what.document == "001"]
    assert [what.name for what in catalogue.chosen(["001", first])] == of_001
    assert len(catalogue.chosen([])) == len(known)


def test_an_unknown_item_is_refused_with_what_is_near():
    near = next(iter(catalogue.items()))
    with pytest.raises(ValueError, match=f"unknown item '{near}x'; did you mean {near}"):
        catalogue.chosen([near + "x"])


def test_the_page_of_statements_is_up_to_date(request):
    written = (request.config.rootpath / "docs" / "theory.md").read_text()
    assert written == report.page(), "run make theory"
    for name in catalogue.items():
        assert written.count(f"**`{name}`**") == 1


# What is shown and kept


@pytest.fixture
def results():
    name = next(iter(catalogue.items()))
    below = inequality("below", 1.0, 2.0, stderr=0.1)
    return [Result(name, (claim(below), misprint(FAILING), claim(WITHOUT)), 1.5)]


def test_the_table_shows_measured_values_with_intervals(results):
    text = report.table(results)
    assert "1 [0.7, 1.3]" in text
    assert "≤ 2" in text
    assert "violated, as it must" in text
    assert "HYPOTHESIS FAILS" in text
    assert "1 hypothesis fails" in text


def test_json_has_no_number_that_json_cannot_hold(results):
    found = json.loads(report.as_json(results, quick=True))
    assert found["settings"] == {"quick": True}
    checks = found["items"][0]["checks"]
    assert checks[0]["low"] == pytest.approx(0.7)
    assert checks[2]["measured"] is None


def test_the_dataset_can_be_stored(results, tmp_path):
    verification.dataset(results).to_zarr(tmp_path / "found.zarr", zarr_format=3, consolidated=False)
    back = xr.open_zarr(tmp_path / "found.zarr", consolidated=False).load()
    assert back["verdict"].values.tolist() == ["holds", "violated", "hypothesis fails"]
    assert back["item_verdict"].values.tolist() == ["hypothesis fails"]
    np.testing.assert_allclose(back["high"][0], 1.3)
