"""`mfsde analyse`: what is printed, stored and drawn is what the analysis functions say; wrong input is told apart."""

import numpy as np
import pytest
import xarray as xr

import mfsde
from mfsde import cli
from mfsde.analysis import chaos, entropy, rates, wasserstein
from mfsde.analysis.gibbs import Gibbs
from mfsde.analysis.overview import overview, target
from mfsde.scenarios import DoubleWell, MeanFieldOU

OU = MeanFieldOU(initial_variance=0.49 / 3)
SETTINGS = {"n_replicas": 8, "horizon": 2.0, "dt": 0.02, "seed": 3, "save_every": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def run(folder):
    return mfsde.simulate(OU, n_particles=200, store=folder / "ou.zarr", **SETTINGS)


@pytest.fixture(scope="module")
def large(folder):
    return mfsde.simulate(OU, n_particles=800, store=folder / "large.zarr", **SETTINGS)


def test_the_overview_holds_what_the_functions_return(run):
    found = overview(run, OU)
    law = Gibbs(OU.log_invariant, 1)
    distance = wasserstein.to_law(run, law)
    np.testing.assert_allclose(found.measured["distance"], distance, rtol=1e-9)
    # The quadrature's law is the Gaussian that it is.
    exact = wasserstein.to_law(run, mfsde.Gaussian([0.0], [[0.49 / 3]]))
    np.testing.assert_allclose(distance, exact, rtol=1e-4)
    assert found.rate == rates.exponential(found.measured["distance"])
    entropies = entropy.relative(run, OU.log_invariant, pooled=True)
    xr.testing.assert_allclose(found.measured["relative_entropy"], entropies)
    data = found.dataset()
    assert data.attrs["rate_value"] == found.rate.value
    assert {"distance", "relative_entropy"} <= set(data.data_vars)
    assert {"distance_floor", "distance_unbiased", "relative_entropy_stderr"} <= set(data.coords)


def test_a_reference_run_gives_the_debiased_distance_and_the_coupling_error(run, large):
    found = overview(run, OU, reference=large)
    np.testing.assert_array_equal(found.measured["distance"], wasserstein.debiased(run, large))
    np.testing.assert_array_equal(found.measured["coupling_error"], chaos.coupling_error(run, large))
    # Both relax alike, so no distance decays: that is said, not answered.
    assert found.rate is None
    assert any("no rate" in note for note in found.notes)
    last = overview(run, OU, reference=large, last=True)
    assert "coupling_error" not in last.measured
    assert last.rate is not None
    assert "last frame" in last.measured["distance"].attrs["long_name"]


def test_a_reference_that_still_moves_or_is_the_run_itself_is_pointed_out(run, large):
    # At t = 2 the mean is e^{-2} = .14 away from where it goes, and moved by .23 since t = 1.
    assert any("still moves" in note for note in overview(run, OU, reference=large, last=True).notes)
    settled = mfsde.simulate(OU, n_particles=200, **SETTINGS | {"horizon": 12.0, "seed": 5, "save_every": 100})
    assert not any("still moves" in note for note in overview(run, OU, reference=settled, last=True).notes)
    assert any("is the run itself" in note for note in overview(run, OU, reference=run, last=True).notes)
    with pytest.raises(ValueError, match="the reference is the run itself"):
        overview(run, OU, reference=run)
    with pytest.raises(ValueError, match="two things to compare with"):
        overview(run, OU, reference=large, to="limit")


def test_an_unfinished_run_is_named(run):
    broken = run.assign_attrs(status="interrupted")
    assert "the run is interrupted: it has frames up to t = 2" in overview(broken, OU).notes


def test_a_scenario_without_a_law_needs_a_reference(run):
    with pytest.raises(ValueError, match=r"DoubleWell in dimension 1 offers no law .*reference="):
        overview(run, DoubleWell())
    with pytest.raises(ValueError, match="expected one of invariant, limit"):
        target(OU, 1, "stationary")
    assert target(MeanFieldOU(initial_mean=(1.0,) * 3), 3, None)[1] == "the limit at every time"
    with pytest.raises(ValueError, match="dimension 3 offers no invariant"):
        target(MeanFieldOU(initial_mean=(1.0,) * 3), 3, "invariant")


def test_the_command_prints_stores_and_draws(folder, run, capsys):
    out, figure = folder / "analysis.zarr", folder / "ou.png"
    assert cli.main(["analyse", str(folder / "ou.zarr"), "--out", str(out), "--figure", str(figure)]) == 0
    printed = capsys.readouterr().out
    assert "KL to invariant" in printed
    assert "is not what it was" not in printed
    rate = overview(run, OU).rate
    assert f"rate of W₂: {rate}" in printed
    with xr.open_zarr(out, consolidated=False) as stored:
        assert stored.attrs["rate_value"] == rate.value
        assert stored.sizes["time"] == run.sizes["time"]
    assert figure.stat().st_size > 10_000
    assert cli.main(["analyse", str(folder / "ou.zarr"), "--out", str(out)]) == 2
    assert "exists; choose another, or pass --overwrite" in capsys.readouterr().err
    assert cli.main(["analyse", str(folder / "ou.zarr"), "--out", str(out), "--overwrite", "--every", "2"]) == 0
    with xr.open_zarr(out, consolidated=False) as stored:
        assert stored.sizes["time"] == (run.sizes["time"] + 1) // 2


def test_nothing_but_an_earlier_analysis_is_overwritten(folder, run, capsys):
    store, precious = folder / "ou.zarr", folder / "precious"
    precious.mkdir()
    (precious / "data.txt").write_text("mine")
    for out, message in ((store, "is a run that is analysed"), (precious, "is no analysis")):
        assert cli.main(["analyse", str(store), "--out", str(out), "--overwrite"]) == 2
        assert message in capsys.readouterr().err
    assert (precious / "data.txt").read_text() == "mine"
    assert mfsde.open_run(store).sizes == run.sizes


def test_a_scenario_that_changed_since_the_run_is_pointed_out(folder, run, monkeypatch, capsys):
    monkeypatch.setattr("mfsde.provenance.source_digest", lambda scenario: "another")
    assert cli.main(["analyse", str(folder / "ou.zarr")]) == 0
    assert "MeanFieldOU is not what it was" in capsys.readouterr().out


def test_the_window_follows_the_options(folder, run, capsys):
    assert cli.main(["analyse", str(folder / "ou.zarr"), "--start", "0.4", "--stop", "1.2"]) == 0
    assert "window [0.4, 1.2]" in capsys.readouterr().out


def test_wrong_usage_is_told_apart(folder, run, large, capsys):
    assert cli.main(["analyse", str(folder / "ou.zarr"), "--last"]) == 2
    assert "--reference STORE, which is missing" in capsys.readouterr().err
    for option, message in (
        (["--figure", "x.xyz"], "expected a file that ends in .png"),
        (["--figure", str(folder / "none" / "x.png")], "there is no folder"),
        (["--every", "0"], "expected a number of frames"),
        (["--to", "limit", "--reference", "r.zarr"], "two things to compare with"),
    ):
        assert cli.main(["analyse", str(folder / "ou.zarr"), *option]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["analyse", str(folder / "nothing.zarr")]) == 1
    assert "There is nothing at" in capsys.readouterr().err
    mfsde.simulate(DoubleWell(), n_particles=20, store=folder / "well.zarr", **SETTINGS)
    assert cli.main(["analyse", str(folder / "well.zarr")]) == 1
    assert "--reference STORE" in capsys.readouterr().err


def test_a_scenario_that_is_gone_still_compares_with_a_reference(folder, run, large, monkeypatch, capsys):
    def gone(described):
        raise mfsde.provenance.CannotRebuild("it was defined in a notebook")

    monkeypatch.setattr("mfsde.provenance.rebuild", gone)
    assert cli.main(["analyse", str(folder / "ou.zarr")]) == 2
    assert "compare with another run: --reference" in capsys.readouterr().err
    assert cli.main(["analyse", str(folder / "ou.zarr"), "--reference", str(folder / "large.zarr"), "--last"]) == 0
    assert "rate of W₂" in capsys.readouterr().out
