"""The method that an equation's limit is computed by, and the command line's table of it."""

import importlib
from dataclasses import dataclass

import numpy as np
import pytest

import mfsde
from mfsde import cli
from mfsde.limit import evolve
from mfsde.scenarios import DoubleWell, IsotropicGaussians, MeanFieldOU, TwoLayerNetwork


def run(*arguments):
    return cli.main(["limit", *arguments])


def test_the_equation_decides():
    assert evolve(MeanFieldOU(), [0.5], n_nodes=65).attrs["method"] == "bdf"
    high = evolve(MeanFieldOU(initial_mean=(1.0, 0.0, 0.0, 2.0)), [0.5])
    assert high.attrs["method"] == "moments"
    wanted = MeanFieldOU(initial_mean=(1.0, 0.0, 0.0, 2.0)).limit(0.5)
    assert high["mean"].values[0] == pytest.approx(wanted.mean.numpy(), abs=1e-9)
    assert high.covariance.values[0] == pytest.approx(wanted.cov.numpy(), abs=1e-9)
    quiet = evolve(IsotropicGaussians(), [0.5], n_nodes=16)
    assert "weight" in quiet
    with pytest.raises(ValueError, match=r"lives in dimension 66: densities .* do not close"):
        evolve(TwoLayerNetwork(), [0.5])


def test_common_noise_takes_the_path_of_a_run():
    @dataclass(frozen=True)
    class Shared(MeanFieldOU):
        def common_diffusion(self, t, x, mu):
            return 0.3

    found = evolve(Shared(), [0.1], dt=0.05, seed=1, n_replicas=2, n_nodes=65)
    assert found.density.dims == ("time", "replica", "x")


def test_the_command_line_prints_stores_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--horizon", "0.5", "--frames", "2", "--nodes", "65"]
    assert run("DoubleWell", *small, "--out", "limit.zarr") == 0
    printed = capsys.readouterr().out
    assert "by bdf" in printed
    assert "free_energy" in printed
    opened = mfsde.open_run("limit.zarr")
    assert opened.time.values == pytest.approx([0.0, 0.25, 0.5])
    assert f"{float(opened['mean'][-1, 0]):.6g}" in printed
    assert run("DoubleWell", *small, "--out", "limit.zarr") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("DoubleWell", *small, "--out", "limit.zarr", "--overwrite") == 0
    capsys.readouterr()
    assert run("DoubleWell", *small, "--particles", "200", "--replicas", "3", "--figure", "well.png") == 0
    assert (tmp_path / "well.png").stat().st_size > 10_000
    assert "200 particles under their limit" in capsys.readouterr().out


def test_a_law_without_a_density_is_drawn_too(tmp_path, capsys):
    few = ["--horizon", "0.2", "--dt", "0.1", "--particles", "50", "--frames", "1", "--nodes", "32"]
    assert run("IsotropicGaussians", *few, "--figure", str(tmp_path / "radii.png")) == 0
    assert (tmp_path / "radii.png").stat().st_size > 10_000
    assert run("VariableSelection", *few[:-2], "--nodes", "8", "--figure", str(tmp_path / "no.png")) == 2
    assert "one or two components" in capsys.readouterr().err


def test_the_command_line_prints_stationary_laws(capsys):
    assert run("DoubleWell", "--stationary") == 0
    printed = capsys.readouterr().out
    assert "3 stationary laws found" in printed
    assert "-0.66613782" in printed
    assert run("MeanFieldOU", "--stationary", "--set", "kappa=-1") == 1
    assert "too weak" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["Nobody"], "no built-in scenario"),
        (["DoubleWell", "--frames", "0"], "--frames 0"),
        (["DoubleWell", "--horizon", "-1"], "--horizon -1"),
        (["DoubleWell", "--nodes", "3"], "--nodes 3"),
        (["DoubleWell", "--stationary", "--out", "x.zarr"], "--stationary prints"),
        (["DoubleWell", "--figure", "well.bmp"], "ends in"),
        (["DoubleWell", "--figure", "nowhere/well.png"], "no folder"),
    ],
)
def test_wrong_usage_is_refused_before_any_work(arguments, text, capsys):
    assert run(*arguments) == 2
    assert text in capsys.readouterr().err


def test_a_scenario_in_a_file_of_its_own(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "import mfsde\n"
        "@dataclass(frozen=True)\n"
        "class Mine:\n"
        "    sigma: float = 0.5\n"
        "    def drift(self, t, x, mu): return -x\n"
        "    def diffusion(self, t, x, mu): return self.sigma\n"
        "    def initial(self): return mfsde.Gaussian([1.0], [[1.0]])\n"
    )
    assert run(f"{file}:Mine", "--horizon", "1", "--frames", "1", "--nodes", "129") == 0
    printed = capsys.readouterr().out
    assert f"{np.exp(-1.0):.4g}"[:5] in printed
    # Without suggestions a horizon has to be given.
    assert run(f"{file}:Mine") == 2
    assert "--horizon" in capsys.readouterr().err


def test_the_times_of_a_run_are_whole_steps():
    every, times = cli._frames({"horizon": 5.0, "dt": 0.01}, 8)
    assert every == 50
    assert times == pytest.approx(np.arange(11) * 0.5)
    assert cli._frames({"horizon": 1.0}, 4) == (None, [0.0, 0.25, 0.5, 0.75, 1.0])


def test_a_gaussian_limit_of_moments_agrees_with_the_density():
    well = DoubleWell()
    with pytest.raises(ValueError, match="not affine"):
        mfsde.limit.moments(well, [1.0])
    ou = MeanFieldOU()
    density = mfsde.limit.fokker_planck(ou, None, [1.0])
    moments = mfsde.limit.moments(ou, [1.0])
    assert float(density["mean"][0, 0]) == pytest.approx(float(moments["mean"][0, 0]), abs=1e-6)
    assert float(density.covariance[0, 0, 0]) == pytest.approx(float(moments.covariance[0, 0, 0]), abs=1e-6)


def test_a_slow_drift_is_told_of_while_the_points_move(capsys, monkeypatch):
    evolve(IsotropicGaussians(), [0.5], n_nodes=16, progress=True)
    fast = capsys.readouterr().err
    assert "limit of IsotropicGaussians along 16 points: percent 200 of 200" in fast
    assert "one call of the drift" not in fast
    monkeypatch.setattr(importlib.import_module("mfsde.limit.characteristics"), "SLOW", 0.0)
    evolve(IsotropicGaussians(), [0.5], n_nodes=16, progress=True)
    slow = capsys.readouterr().err
    assert slow.count("one call of the drift takes") == 1
    assert "--nodes" in slow
    evolve(IsotropicGaussians(), [0.5], n_nodes=16)
    assert capsys.readouterr().err == ""
