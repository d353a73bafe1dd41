"""The house: what may import what, and an installed wheel that works in another folder."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mfsde

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# A file imports only from files to its left. `limit` and the command line stand beside this line.
ORDER = [
    *("tape", "torus", "pairwise", "measure", "product", "phase_space", "energy", "extensions", "activation"),
    *("network", "regularisers", "convex_sets"),
    *("homogeneous", "nonlinear_process", "model", "selection", "langevin", "kinetic"),
    *("_noise_numpy", "_noise_torch", "_noise_triton", "noise", "clock", "diffusion", "euler"),
    *("forward_backward", "runge_kutta", "draws", "sgd", "splitting", "birth_death", "methods", "pages", "solver"),
    *("observables", "gradient_flow", "provenance", "store", "settings", "progress", "compilation", "transfer"),
    *("allocations", "replica_blocks", "memory", "workers", "run"),
    *("halves", "levels", "multilevel", "family"),
    *("parameters", "differentiability", "replay", "sensitivity", "calibration", "cli"),
]


# The same inside the folder of pairwise sums, which knows of nothing but the two files to its left.
PAIRWISE = [
    *("kernel", "blocked", "expression", "trace", "source", "native", "compiled", "moments"),
    *("cells", "batches", "grid", "fourier", "keops", "convolution"),
]


def imports(file: Path) -> list[tuple[str, bool]]:
    """(module, is it relative) for every import of a file, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(name, node.level > 0) for name in names]
    return found


@pytest.mark.parametrize("name", [name for name in ORDER[:-1] if name != "pairwise"])
def test_inside_the_engine_imports_point_one_way(name):
    left = {*ORDER[: ORDER.index(name)], "__version__"}
    for module, relative in imports(ROOT / "mfsde" / f"{name}.py"):
        head = module.split(".")[0]
        if relative:
            assert head in left | {"_noise", "_activation"}, f"{name} imports {module}"
        else:
            assert head != "mfsde", f"{name} imports {module} by its absolute name"


def test_strategies_of_pairwise_sums_import_one_way():
    folder = ROOT / "mfsde" / "pairwise"
    assert {file.stem for file in folder.glob("*.py")} == {*PAIRWISE, "__init__"}
    for k, name in enumerate(PAIRWISE):
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                named = [node.module] if node.module else [alias.name for alias in node.names]
                allowed = PAIRWISE[:k] if node.level == 1 else ["tape", "torus"]
                assert set(named) <= set(allowed), f"pairwise/{name} imports {named}"


def test_the_limit_imports_from_the_store_downwards_and_in_one_direction():
    files = {file.stem: file for file in (ROOT / "mfsde" / "limit").glob("*.py") if file.stem != "__init__"}
    # What stands to the left of the store, and two files that know no more than it does.
    left = {*ORDER[: ORDER.index("store") + 1], "settings", "progress"} - {"solver"}
    needs: dict[str, set[str]] = {}
    for name, file in files.items():
        needs[name] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                named = [node.module] if node.module else [alias.name for alias in node.names]
                if node.level == 1:
                    needs[name] |= {head.split(".")[0] for head in named} & set(files)
                else:
                    assert {head.split(".")[0] for head in named} <= left, f"limit/{name} imports {named}"
    done: set[str] = set()
    while len(done) < len(needs):
        ready = {name for name, wanted in needs.items() if name not in done and wanted <= done}
        assert ready, f"a circle among {sorted(set(needs) - done)}"
        done |= ready


def test_a_name_of_the_limit_is_the_function_and_not_its_module():
    from mfsde import limit

    importlib.import_module("mfsde.limit.gibbs")
    for name in ("gibbs", "fokker_planck", "jko", "moments", "characteristics", "flow"):
        assert callable(getattr(limit, name)), name


@pytest.mark.parametrize(("library", "home"), [("torchsde", "solver"), ("zarr", "store"), ("ot", "wasserstein")])
def test_a_library_is_known_to_one_file(library, home):
    for folder in ("mfsde", "scenarios", "analysis", "verification"):
        for file in (ROOT / folder).rglob("*.py"):
            known = any(module.split(".")[0] == library for module, _ in imports(file))
            assert not known or file.stem == home, f"{file} imports {library}"


@pytest.mark.parametrize(
    ("folder", "unknown"),
    [
        ("mfsde", "scenarios|analysis|verification"),
        ("scenarios", "analysis|verification"),
        ("analysis", "scenarios|verification"),
    ],
)
def test_a_folder_knows_nothing_of_what_stands_on_it(folder, unknown):
    for file in (ROOT / folder).rglob("*.py"):
        if file.name != "cli.py":
            assert not any(re.search(rf"\b({unknown})\b", module) for module, _ in imports(file)), file


def test_every_sub_package_is_listed():
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])
    mapping = PYPROJECT["tool"]["setuptools"]["package-dir"]
    folders = {"mfsde": "mfsde"} | {f"mfsde.{name}": name for name in ("scenarios", "analysis", "verification")}
    assert mapping == folders
    found = set()
    for package, folder in folders.items():
        for file in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *file.parent.relative_to(ROOT / folder).parts]))
    assert listed == found


def test_public_names_load_lazily_and_exist():
    for name in mfsde.__all__:
        assert getattr(mfsde, name) is not None
    assert set(mfsde.__all__) <= set(dir(mfsde))
    code = "import sys, mfsde; assert 'torch' not in sys.modules and 'xarray' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        _ = mfsde.simulat


def test_no_module_bears_the_name_of_a_public_function():
    modules = {file.stem for file in (ROOT / "mfsde").glob("*.py")}
    assert not modules & set(mfsde.__all__)


def test_the_version_is_that_of_the_project():
    assert mfsde.__version__ == PYPROJECT["project"]["version"]


def test_pinned_versions_are_the_tested_ones():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert pins["torchsde"] == "0.2.6"
    assert importlib.metadata.version("torchsde") == "0.2.6"
    for requirement in PYPROJECT["project"]["dependencies"]:
        name = re.match(r"[\w-]+", requirement).group()
        assert name in pins, f"{name} has no tested version in constraints.txt"


@pytest.mark.parametrize("compiler", ["cc", "/bin/false"])
def test_an_installed_wheel_imports_and_runs_from_another_directory(tmp_path, compiler):
    if compiler == "cc" and not (shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("no C compiler here")
    source = tmp_path / "source"
    kept = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("mfsde", "scenarios", "analysis", "verification"):
        shutil.copytree(ROOT / name, source / name, ignore=kept)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    site = tmp_path / "site"
    build = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site)]
    environment = {"PATH": "/usr/bin:/bin", "CC": compiler, "HOME": str(tmp_path)}
    done = subprocess.run([*build, str(source)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    code = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n"
        "import mfsde, mfsde.noise\n"
        "from mfsde.scenarios import MeanFieldOU\n"
        "from mfsde.analysis import wasserstein\n"
        "run = mfsde.simulate(MeanFieldOU(), n_particles=300, horizon=0.1, dt=0.01, seed=1)\n"
        "print(mfsde.__file__, mfsde.noise.backend(), run.position.values.tobytes().hex()[-64:])"
    )
    # Neither the current folder nor the checkout's editable install may answer instead.
    environment = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    ran = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    file, backend, bits = ran.stdout.split()
    assert file.startswith(str(site))
    assert backend == ("c" if compiler == "cc" else "numpy")
    from mfsde.scenarios import MeanFieldOU

    here = mfsde.simulate(MeanFieldOU(), n_particles=300, horizon=0.1, dt=0.01, seed=1)
    # Without a compiler every result stays the same.
    assert here.position.values.tobytes().hex()[-64:] == bits


def test_the_readme_shows_the_example_that_is_run():
    code = (ROOT / "examples" / "convergence.py").read_text().split('"""\n\n', 1)[1].strip()
    assert code in (ROOT / "README.md").read_text()


def test_the_files_of_the_analysis_import_in_one_direction():
    files = {file.stem: file for file in (ROOT / "analysis").glob("*.py")}
    needs = {
        name: {head for module, relative in imports(file) if relative and (head := module.split(".")[0]) in files}
        for name, file in files.items()
    }
    done: set[str] = set()
    while len(done) < len(needs):
        ready = {name for name, left in needs.items() if name not in done and left <= done}
        assert ready, f"a circle among {sorted(set(needs) - done)}"
        done |= ready
