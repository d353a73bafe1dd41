"""The command line as a person uses it: right, wrong, interrupted."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import xarray as xr

import mfsde
from mfsde.cli import main
from mfsde.scenarios import BUILT_IN

SCENARIO = '''
from dataclasses import dataclass
import mfsde

@dataclass(frozen=True)
class Pull:
    """dX = -κX dt + σ dW."""
    kappa: float = 1.0
    sigma: float = 0.7
    centre: tuple = (0.0, 0.0)
    def drift(self, t, x, mu):
        return -self.kappa * (x - x.new_tensor(self.centre))
    def diffusion(self, t, x, mu):
        return self.sigma
    def initial(self):
        return mfsde.Gaussian([0.0, 0.0], 1.0)
'''
SETTINGS = [
    "--particles",
    "40",
    "--replicas",
    "2",
    "--horizon",
    "0.5",
    "--dt",
    "0.01",
    "--seed",
    "3",
    "--save-every",
    "5",
]


@pytest.fixture
def scenario_file(tmp_path):
    file = tmp_path / "elsewhere" / "mine.py"
    file.parent.mkdir()
    file.write_text(SCENARIO)
    return file


def command(*arguments, folder, **options):
    return subprocess.run(
        [sys.executable, "-m", "mfsde", *map(str, arguments)], cwd=folder, capture_output=True, text=True, **options
    )


def refused(capsys, *arguments, code):
    assert main(list(map(str, arguments))) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def test_a_scenario_in_a_file_outside_the_repository_runs_with_its_fields_set(scenario_file, tmp_path):
    fields = ["--set", "sigma=0.5", "--set", "centre=(1.0, 2.0)"]
    done = command("run", f"{scenario_file}:Pull", *fields, *SETTINGS, "--out", "run.zarr", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    run = mfsde.open_run(tmp_path / "run.zarr")
    assert float(run.sigma) == 0.5
    assert run.attrs["scenario"] == "Pull"
    assert dict(run.sizes) == {"time": 11, "replica": 2, "particle": 40, "component": 2}
    # The same numbers as from Python.
    from mfsde.provenance import load_class

    again = load_class(f"{scenario_file}:Pull")(sigma=0.5, centre=(1.0, 2.0))
    direct = mfsde.simulate(
        again, n_particles=40, n_replicas=2, horizon=0.5, dt=0.01, seed=3, save_every=5, dtype=torch.float32
    )
    np.testing.assert_array_equal(run.position.values, direct.position.values)


def test_what_the_scenario_suggests_is_used_and_printed(tmp_path, capsys):
    out = tmp_path / "ou.zarr"
    assert main(["run", "MeanFieldOU", "--particles", "10", "--horizon", "0.1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "suggested by MeanFieldOU: " in printed
    assert "dt=0.01" in printed
    assert "n_particles" not in re.search("suggested by.*", printed).group()
    assert mfsde.open_run(out).sizes["replica"] == 8


def test_observables_substeps_and_dtype_reach_the_run(tmp_path):
    out = tmp_path / "ou.zarr"
    arguments = ["--particles", "10", "--horizon", "0.1", "--observe", "mean", "--substeps", "2", "--dtype", "float64"]
    assert main(["run", "MeanFieldOU", *arguments, "--keep-particles", "3", "--out", str(out)]) == 0
    run = mfsde.open_run(out)
    assert run["mean"].dtype == np.float64
    assert run.sizes["particle"] == 3
    direct = mfsde.simulate(
        mfsde.scenarios.MeanFieldOU(), n_particles=10, n_replicas=8, horizon=0.1, dt=0.01, seed=0, save_every=10,
        noise=mfsde.Noise(0, substeps=2), dtype=torch.float64, observables="mean",
    )  # fmt: skip
    np.testing.assert_array_equal(run["mean"].values, direct["mean"].values)


def test_list_and_info_show_scenarios_fields_and_suggestions(capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == list(BUILT_IN)
    assert main(["info", "DoubleWell", "--set", "theta=2.5"]) == 0
    shown = capsys.readouterr().out
    assert "theta = 2.5" in shown
    assert "n_particles = 2000" in shown
    assert "energy" in shown


def test_a_sweep_stores_its_table_and_goes_on_where_it_stopped(tmp_path, capsys):
    arguments = ["sweep", "MeanFieldOU", "--over", "sigma=0.5,1", "--over", "particles=5,10", "--horizon", "0.1"]
    arguments += ["--observe", "mean", "--out", str(tmp_path / "sweep")]
    assert main(arguments) == 0
    table = xr.open_zarr(tmp_path / "sweep" / "table.zarr", consolidated=False)
    assert table["mean"].dims[:2] == ("sigma", "n_particles")
    one = tmp_path / "sweep" / "sigma=0.5,n_particles=5.zarr"
    written = one.stat().st_mtime_ns
    assert main(arguments) == 0
    assert one.stat().st_mtime_ns == written
    again = xr.open_zarr(tmp_path / "sweep" / "table.zarr", consolidated=False)
    xr.testing.assert_equal(table.load(), again)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "MeanFieldO", "--out", "x"], 2, "no built-in scenario 'MeanFieldO'.*MeanFieldOU.*file.py:ClassName"),
        (["run", "MeanFieldOU", "--set", "sigm=1", "--out", "x"], 2, "no field 'sigm'; its fields are kappa"),
        (["run", "MeanFieldOU", "--set", "sigma", "--out", "x"], 2, "expected FIELD=VALUE"),
        (["run", "MeanFieldOU", "--set", "sigma=fast", "--out", "x"], 2, "expected a float, got 'fast'"),
        (["run", "MeanFieldOU", "--dtype", "half", "--out", "x"], 2, "expected float32 or float64"),
        (["run", "nowhere.py:A", "--out", "x"], 1, "there is no file .*nowhere.py"),
        (["run", "MeanFieldOU", "--particles", "0", "--out", "x"], 1, "n_particles = 0; expected a whole number >= 1"),
        (["run", "MeanFieldOU", "--dt", "0.03", "--out", "x"], 1, "not a whole number of steps.*nearest horizons are"),
        (["run", "MeanFieldOU", "--dt", "-1", "--out", "x"], 1, "dt = -1.0; expected a positive"),
        (["run", "MeanFieldOU", "--method", "rk4", "--out", "x"], 1, "unknown method 'rk4'; expected one of euler"),
        (["run", "MeanFieldOU", "--observe", "volume", "--out", "x"], 1, "unknown name 'volume'"),
        (["run", "MeanFieldOU", "--device", "abacus", "--out", "x"], 1, "no torch device"),
        (["run", "MeanFieldOU", "--dt", "0", "--out", "x"], 1, "dt = 0.0; expected a positive"),
        (["run", "MeanFieldOU", "--dt", "nan", "--out", "x"], 1, "dt = nan; expected a positive"),
        (["sweep", "MeanFieldOU", "--over", "sigma=1", "--over", "sigma=2", "--out", "x"], 2, "sigma is given twice"),
        (["sweep", "MeanFieldOU", "--over", "seed=0,1", "--substeps", "2", "--out", "x"], 2, "noise of one seed"),
        (["resume", "nothing.zarr"], 1, "nothing.zarr"),
        (
            ["sweep", "MeanFieldOU", "--over", "speed=1", "--observe", "mean", "--out", "x"],
            1,
            "'speed' is neither a field",
        ),
        (["sweep", "MeanFieldOU", "--over", "sigma=1,2", "--out", "x"], 2, "table of this sweep would be empty"),
        (["sweep", "MeanFieldOU", "--over", "sigma=1,2", "--set", "sigma=3", "--out", "x"], 2, "both swept and set"),
        (["run", "my.py", "--out", "x"], 2, "names no class; write my.py:ClassName"),
        (["sweep", "MeanFieldOU", "--over", "sigma", "--out", "x"], 2, "expected NAME=V1,V2"),
    ],
)
def test_wrong_input_is_refused_with_the_next_move(capsys, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, refused(capsys, *arguments, code=code), re.DOTALL)
    assert not (tmp_path / "x").exists()


def test_a_file_without_the_class_names_the_classes_it_has(capsys, scenario_file):
    assert "its classes are: Pull" in refused(capsys, "info", f"{scenario_file}:Push", code=1)


def test_settings_that_nobody_suggests_must_be_passed(capsys, scenario_file, tmp_path):
    told = refused(capsys, "run", f"{scenario_file}:Pull", "--dt", "0.1", "--out", tmp_path / "x", code=2)
    assert "--particles --horizon --seed" in told


def test_an_existing_store_is_kept(capsys, tmp_path):
    out = str(tmp_path / "ou.zarr")
    arguments = ["run", "MeanFieldOU", "--particles", "5", "--horizon", "0.1", "--out", out]
    assert main(arguments) == 0
    assert "exists already" in refused(capsys, *arguments, "--seed", "9", code=1)
    assert int(mfsde.open_run(out).seed) == 0
    assert main([*arguments, "--seed", "9", "--overwrite"]) == 0
    assert int(mfsde.open_run(out).seed) == 9


def test_unknown_options_and_missing_commands_exit_with_2(tmp_path):
    assert command(folder=tmp_path).returncode == 2
    assert command("run", "MeanFieldOU", folder=tmp_path).returncode == 2
    assert command("fly", folder=tmp_path).returncode == 2


def test_help_does_not_import_torch(tmp_path):
    code = "import sys; from mfsde.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resume" in done.stdout


def test_ctrl_c_leaves_a_run_that_resume_completes(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    long = ["run", "MeanFieldOU", "--particles", "2000", "--horizon", "200", "--save-every", "400"]
    long += ["--checkpoint-every", "2000", "--out"]
    call = [sys.executable, "-m", "mfsde", *long, "cut.zarr"]
    child = subprocess.Popen(call, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not _committed(tmp_path / "cut.zarr"):
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=60)
    assert child.returncode == 130
    assert re.search("interrupted at step .* mfsde.resume", told), told
    assert "Traceback" not in told
    cut = mfsde.open_run(tmp_path / "cut.zarr")
    assert cut.attrs["status"] == "interrupted"
    assert 0 < cut.sizes["time"] < 51
    assert command("resume", "cut.zarr", folder=tmp_path, env=environment).returncode == 0
    assert command(*long, "whole.zarr", folder=tmp_path, env=environment).returncode == 0
    resumed, whole = (mfsde.open_run(tmp_path / name) for name in ("cut.zarr", "whole.zarr"))
    assert resumed.attrs["status"] == "complete"
    np.testing.assert_array_equal(resumed.position.values, whole.position.values)


def _committed(store) -> bool:
    try:
        return mfsde.open_run(store).sizes["time"] > 1
    except (OSError, ValueError):
        return False


def test_the_annotation_says_how_a_field_is_read(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(SCENARIO.replace("sigma: float = 0.7", "sigma: float = 1"))
    out = tmp_path / "run.zarr"
    assert main(["run", f"{file}:Pull", "--set", "sigma=0.5", *SETTINGS, "--out", str(out)]) == 0
    assert float(mfsde.open_run(out).sigma) == 0.5


def test_a_sweep_over_dtypes_labels_its_axis(tmp_path):
    arguments = ["sweep", "MeanFieldOU", "--over", "dtype=float32,float64", "--particles", "5", "--horizon", "0.1"]
    assert main([*arguments, "--observe", "mean", "--out", str(tmp_path / "sweep")]) == 0
    table = xr.open_zarr(tmp_path / "sweep" / "table.zarr", consolidated=False)
    assert table.dtype.values.tolist() == ["float32", "float64"]


def test_as_puts_the_energy_of_a_scenario_under_another_dynamics(tmp_path, capsys):
    out = tmp_path / "run.zarr"
    short = ["--particles", "20", "--horizon", "0.1", "--dt", "0.05", "--seed", "1", "--out", str(out), "--overwrite"]
    assert main(["run", "DoubleWell", "--as", "kinetic", "--set", "gamma=4", "--set", "theta=0.5", *short]) == 0
    assert "method=baoab" in capsys.readouterr().out
    run = mfsde.open_run(out)
    assert (run.attrs["method"], run.sizes["component"], float(run.theta)) == ("baoab", 2, 0.5)
    assert main(["run", "GaussianMixture", "--as", "gradient_flow", "--set", "alpha=2", *short]) == 0
    assert mfsde.open_run(out).attrs["selection"] == "energy"  # the dynamics' alpha, not the scenario's
    assert main(["run", "DoubleWell", "--as", "birth_death", "--antithetic", "--replicas", "2", *short]) == 0
    assert mfsde.open_run(out).attrs["reaction"] == "jumps"
    capsys.readouterr()
    for arguments, told, code in (
        (["--as", "sgd"], "--as sgd: expected one of gradient_flow, langevin, kinetic, birth_death, noisy_sgd", 2),
        (["--as", "kinetic", "--set", "gamma=-2"], "gamma = -2.0; expected a friction > 0", 1),
        (["--as", "kinetic", "--set", "gamma=fast"], "--set gamma=fast: expected a float", 2),
        (["--as", "langevin", "--set", "speed=1"], "DoubleWell has no field 'speed'", 2),
        (["--as", "noisy_sgd"], "has no risk", 1),
    ):
        assert told in refused(capsys, "run", "DoubleWell", *arguments, *short, code=code)


def test_a_scenario_is_stepped_by_the_method_that_suits_it(tmp_path, capsys):
    file = tmp_path / "flow.py"
    file.write_text(SPARSE)
    short = ["--particles", "30", "--horizon", "5", "--dt", "0.05", "--seed", "0"]
    assert main(["run", f"{file}:Sparse", *short, "--out", str(tmp_path / "a.zarr")]) == 0
    assert "Sparse is stepped by method=proximal" in capsys.readouterr().out
    assert float(abs(mfsde.open_run(tmp_path / "a.zarr").position.isel(time=-1)).max()) == 0.0
    assert main(["run", f"{file}:Sparse", *short, "--method", "euler", "--out", str(tmp_path / "b.zarr")]) == 0
    assert float(abs(mfsde.open_run(tmp_path / "b.zarr").position.isel(time=-1)).max()) > 0.0


SPARSE = """
from dataclasses import dataclass
from functools import cached_property
import mfsde
from mfsde.regularisers import L1

@dataclass(frozen=True)
class Sparse(mfsde.GradientFlow):
    regulariser = L1(2.0)
    @cached_property
    def energy(self):
        return mfsde.potential(lambda x: 0.5 * (x - 0.3).square().sum(-1))
    def initial(self):
        return mfsde.Gaussian([0.0], 1.0)
"""


def test_a_stored_limit_is_neither_resumed_nor_analysed(tmp_path, capsys):
    out = str(tmp_path / "limit.zarr")
    assert main(["limit", "MeanFieldOU", "--horizon", "0.2", "--frames", "1", "--nodes", "33", "--out", out]) == 0
    capsys.readouterr()
    assert "is a limit, which is stored as a whole" in refused(capsys, "resume", out, code=2)
    assert f"mfsde analyse RUN --reference {out}" in refused(capsys, "analyse", out, code=2)


def test_a_plan_says_what_a_run_takes_and_whether_it_fits(capsys):
    assert main(["plan", "MeanFieldOU", *SETTINGS]) == 0
    told = capsys.readouterr().out
    assert re.search(r"MeanFieldOU: needs [\d.]+ kB of .* memory \(state [\d.]+ B, drift .*, 11 frames", told), told
    assert main(["plan", "MeanFieldOU", *SETTINGS, "--memory", "1e-6"]) == 1
    assert "does not fit" in capsys.readouterr().out
    assert main(["run", "MeanFieldOU", *SETTINGS, "--memory", "1e-6", "--out", "never.zarr"]) == 1
    assert "DoesNotFit" in capsys.readouterr().err


def test_a_sweep_is_told_how_many_processes_share_it_and_what_they_may_take(tmp_path, monkeypatch, capsys):
    told = []
    sweep = mfsde.sweep
    monkeypatch.setattr(mfsde, "sweep", lambda *args, **kw: told.append(kw) or sweep(*args, **{**kw, "workers": 1}))
    asked = ["sweep", "MeanFieldOU", *SETTINGS, "--over", "sigma=0.5,1", "--observe", "mean", "--out", str(tmp_path)]
    assert main([*asked, "--workers", "2", "--memory", "1.5"]) == 0
    assert (told[0]["workers"], told[0]["memory"]) == (2, 1.5e9)
    assert xr.open_zarr(tmp_path / "table.zarr", consolidated=False)["mean"].sizes["sigma"] == 2
    monkeypatch.undo()
    assert main([*asked, "--workers", "0"]) == 1
    assert "workers = 0; expected a whole number >= 1" in capsys.readouterr().err


def test_the_noise_of_float32_drives_a_run_in_float64(tmp_path, capsys):
    asked = ["run", "MeanFieldOU", *SETTINGS, "--dtype", "float64", "--overwrite", "--out", str(tmp_path / "run.zarr")]
    assert main([*asked, "--noise-precision", "float32"]) == 0
    cheap = mfsde.open_run(tmp_path / "run.zarr").load()
    assert main(asked) == 0
    full = mfsde.open_run(tmp_path / "run.zarr").load()
    assert cheap.position.dtype == np.float64
    assert 0 < float(abs(cheap.position - full.position).max()) < 1e-5
    assert main([*asked, "--noise-precision", "half"]) == 2
    assert "--noise-precision half: expected float32 or float64" in capsys.readouterr().err
