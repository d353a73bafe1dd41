"""Verification: verdicts of items, what catches a fault, the table, JSON and Dataset, and the command."""

import functools
import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from mfsde import cli
from mfsde.analysis.check import identity, inequality, unfounded
from mfsde.verification import catalogue, report
from mfsde.verification import measurement as verification
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
    # Not by ==, whose explanation of two long texts takes minutes.
    if written != report.page():
        pytest.fail("docs/theory.md is not what verification/ says; run make theory")
    for name in catalogue.items():
        assert written.count(f"**`{name}`**") == 1


# Those that take no time are measured here; all of them by mfsde verify.
CHEAP = (
    *("contraction", "gamma-limit", "deep-network", "barron", "random-features"),
    *("proximal-steps", "planted-relu", "student-teacher", "sphere", "bounded-lipschitz"),
)


@pytest.mark.parametrize("name", CHEAP)
def test_a_statement_holds_and_its_planted_fault_is_caught(name):
    true, faulty = (verification.verify(name, quick=True, faulty=faulty)[0] for faulty in (False, True))
    assert true.verdict == "holds", report.rows(true)
    assert faulty.caught, report.rows(faulty)


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


# The command


@pytest.fixture
def answers(monkeypatch):
    """Every item gets these findings at once."""

    def given(*findings):
        def found(names, quick, faulty, index):
            return Result(names[index], findings, 0.1)

        monkeypatch.setattr(verification, "_measure", found)

    return given


@pytest.mark.parametrize(
    ("findings", "code"),
    [([claim(HOLDING), misprint(FAILING)], 0), ([claim(FAILING)], 1), ([claim(WITHOUT)], 0), ([], 1)],
)
def test_the_exit_code_is_1_where_a_statement_is_violated_or_an_item_raised(answers, findings, code):
    answers(*findings)
    assert cli.main(["verify", "000", "--workers", "1"]) == code


def test_the_exit_code_of_the_self_test_is_1_where_a_fault_is_missed(answers, capsys):
    answers(claim(FAILING))
    assert cli.main(["verify", "sphere", "--self-test", "--workers", "1"]) == 0
    assert "1 of 1 planted faults caught" in capsys.readouterr().out
    answers(claim(HOLDING), misprint(FAILING))
    assert cli.main(["verify", "sphere", "--self-test", "--workers", "1"]) == 1
    assert "MISSED  sphere" in capsys.readouterr().out


def test_results_are_written_and_replaced_when_asked(answers, tmp_path, capsys):
    answers(claim(HOLDING))
    out, file = tmp_path / "found.zarr", tmp_path / "found.json"
    arguments = ["verify", "sphere", "--workers", "1", "--json", str(file), "--out", str(out)]
    assert cli.main(arguments) == 0
    assert json.loads(file.read_text(encoding="utf-8"))["items"][0]["item"] == "sphere"
    assert xr.open_zarr(out, consolidated=False).attrs["long_name"] == verification.LONG_NAME
    assert cli.main(arguments) == 2
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert "found.json exists; choose another, or pass --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sphear"], "did you mean sphere"),
        (["--workers", "0"], "--workers 0: expected a number of processes, 1 or more"),
        (["--workers", "-1"], "--workers -1: expected a number of processes, 1 or more"),
        (["--json", "{folder}/missing/found.json"], "there is no folder"),
        (["--json", "{folder}", "--overwrite"], "is a folder; expected a file"),
        (["--json", "{folder}/found", "--out", "{folder}/found"], "give them two names"),
        (["--out", "{folder}", "--overwrite"], "exists and is no verification"),
        (["--list", "--json", "{folder}/found.json"], "--list measures nothing"),
    ],
)
def test_what_could_only_fail_or_harm_after_the_work_is_refused_before(tmp_path, capsys, arguments, message):
    assert cli.main(["verify", *(text.format(folder=tmp_path) for text in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_statements_are_listed_and_nothing_is_measured(capsys):
    assert cli.main(["verify", "000", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [what.name for what in catalogue.chosen(["000"])]


def test_an_interrupt_says_how_far_it_came(monkeypatch, capsys):
    def interrupted(names, quick, faulty, index):
        if index:
            raise KeyboardInterrupt
        return Result(names[index], (claim(HOLDING),), 0.1)

    monkeypatch.setattr(verification, "_measure", interrupted)
    assert cli.main(["verify", "sphere", "bounded-lipschitz", "--workers", "1"]) == 130
    assert "interrupted after 1 of 2 items; nothing was stored" in capsys.readouterr().err


def test_items_and_what_they_find_can_be_sent_to_another_process():
    task = functools.partial(verification._measure, ("bounded-lipschitz",), True, False)
    result = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(task))(0)))
    assert (result.name, result.verdict) == ("bounded-lipschitz", "holds")
