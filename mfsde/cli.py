"""The command line: parses, calls, prints. Heavy imports happen inside the commands, so that --help is immediate."""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:
    from pathlib import Path

    import xarray as xr

# Command-line options that are settings of `simulate`, with the type of their value (None: a flag).
SETTINGS: dict[str, tuple[str, Callable[[str], Any] | None, str]] = {
    "particles": ("n_particles", int, "number of particles N"),
    "replicas": ("n_replicas", int, "independent copies of the whole system"),
    "horizon": ("horizon", float, "final time"),
    "dt": ("dt", float, "step size"),
    "seed": ("seed", int, "key of all randomness"),
    "save-every": ("save_every", int, "steps between two saved frames"),
    "keep-particles": ("keep_particles", int, "store the first k particles only (0: none)"),
    "method": (
        "method",
        str,
        "euler, milstein, srk, heun, midpoint, euler_heun; baoab, obabo (kinetic), proximal, dopri5, sgd; with births "
        "and deaths followed by +jumps, +clocks or +weights",
    ),
    "device": ("device", str, "cpu or cuda"),
    "dtype": ("dtype", str, "float32 or float64"),
    "substeps": ("substeps", int, "fine Brownian steps in one step"),
    "antithetic": ("antithetic", None, "give replicas 2j and 2j + 1 opposite noise"),
    "noise-precision": ("precision", str, "float32: a float64 run on the normals of float32, which cost less"),
    "compile": ("compile", None, "compile the drift by torch: some seconds, for long runs of many particles"),
    "checkpoint-every": ("checkpoint_every", int, "steps between two checkpoints (default: about 20 in a run)"),
}
# Annotations of fields that say how their text is read; other fields take any Python literal, or the text itself.
PLAIN = {"int": int, "float": float, "str": str, "bool": bool}
# What messages of the library call by keyword, as options.
KEYWORDS = {
    "overwrite=True": "--overwrite",
    "reference=..., last=True": "--reference STORE --last",
    "last=True": "--last",
    "method='": "--method '",
    'method="': '--method "',
    "start=": "--start ",
}
# What a scenario may define besides its equation.
OPTIONAL = (
    *("energy", "confinement", "regulariser", "common_diffusion", "project", "project_at", "period", "force"),
    *("smooth_drift", "proximal", "birth_death_rate", "reinjection", "sample", "limit", "log_invariant", "observables"),
)
REQUIRED = ("n_particles", "horizon", "dt", "seed")
CHECKPOINTS = 20
FIGURES = (".png", ".pdf", ".svg")
ZERO = 1e-10  # a mean that is printed as 0
SHOWN = 4  # components of a state that a table shows

EPILOG = """\
A scenario is a built-in name (mfsde list) or path/to/file.py:ClassName. Its fields are set with --set name=value.
Settings left out come from the scenario's suggested() and are printed.

  mfsde run MeanFieldOU --set sigma=0.5 --particles 1000 --replicas 8 --horizon 4 --dt 0.01 --seed 0 --out ou.zarr
  mfsde resume ou.zarr
  mfsde limit MeanFieldOU --figure ou.png
"""


class UsageError(Exception):
    """A request that the command line can refuse by itself."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit code: 0, 1 after an error or a statement that does not hold, 2 for wrong usage, 130 after Ctrl-C.

    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options) or 0)
    except KeyboardInterrupt as stop:
        steps = options.command in (_run, _resume)
        told = str(stop) or f"interrupted{' before the first step' * steps}; nothing was stored"
        print(f"mfsde: {_as_command(told)}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (head, less) went away; that is no error of ours.
        sys.stderr.close()
        return 1
    except UsageError as problem:
        print(f"mfsde: {problem}", file=sys.stderr)
        return 2
    except (ArithmeticError, AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError) as problem:
        if options.traceback:
            raise
        # The place of a run in a sweep is a note.
        told = "; ".join([str(problem), *getattr(problem, "__notes__", ())])
        print(f"mfsde: {type(problem).__name__}: {_as_command(told)}", file=sys.stderr)
        return 1


def _as_command(message: str) -> str:
    """The next move that a message names, as one types it on the command line."""
    message = re.sub(r"mfsde\.resume\('([^']*)'\)", r"mfsde resume \1", message)
    for keyword, option in KEYWORDS.items():
        message = message.replace(keyword, option)
    return message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mfsde",
        description="McKean-Vlasov SDEs and interacting particle systems.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mfsde {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _command(commands, "list", _list, "list the built-in scenarios")
    _scenario(_command(commands, "info", _info, "show a scenario's equation, fields and suggested settings"))
    run = _scenario(_command(commands, "run", _run, "simulate a scenario and store it"))
    _settings(run)
    run.add_argument("--out", metavar="STORE", required=True, help="folder of the run, for instance run.zarr")
    run.add_argument("--overwrite", action="store_true", help="replace an existing run")
    _memory(run)
    plan = _scenario(_command(commands, "plan", _plan, "what a run would take of memory and disk"))
    _settings(plan)
    plan.add_argument("--out", metavar="STORE", help="folder of the run; without one frames are kept in memory")
    _memory(plan)
    resume = _command(commands, "resume", _resume, "continue an interrupted run")
    resume.add_argument("store", metavar="STORE", help="folder of the run")
    sweep = _scenario(_command(commands, "sweep", _sweep, "run a scenario over a grid"))
    _settings(sweep)
    sweep.add_argument(
        "--over",
        action="append",
        required=True,
        metavar="NAME=V1,V2,...",
        help="values of a field or of a setting (particles, dt, seed, ...); repeatable",
    )
    sweep.add_argument("--out", metavar="FOLDER", required=True, help="folder for the runs and for table.zarr")
    sweep.add_argument("--workers", type=int, default=1, metavar="K", help="processes that share the runs (1)")
    _memory(sweep)
    limit = _scenario(_command(commands, "limit", _limit, "the law that the particles converge to, in time or at rest"))
    _settings(limit)
    _limit_options(limit)
    _analyse_options(_command(commands, "analyse", _analyse, "distance, rate and entropy of a stored run"))
    text = "hold the statements of the source documents against measurements"
    _verify_options(_command(commands, "verify", _verify, text))
    return parser


def _memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory", type=float, metavar="GB", help="what may be taken (four fifths of what is available)"
    )


def _limit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stationary", action="store_true", help="the stationary laws instead of the law in time")
    parser.add_argument(
        "--frames",
        type=int,
        default=8,
        metavar="K",
        help="times after 0 up to the horizon (8); take those at which a run to be compared is saved",
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes on each axis of the grid")
    parser.add_argument("--out", metavar="STORE", help="store the limit, for instance limit.zarr")
    parser.add_argument("--figure", metavar="FILE", help="simulate, and draw the particles on top (png, pdf, svg)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")


def _analyse_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder of the run")
    parser.add_argument(
        "--to", choices=("invariant", "limit"), help="the scenario's law to measure W₂ to (default: what it has)"
    )
    parser.add_argument("--reference", metavar="STORE", help="measure W₂ to another run instead, without its floor")
    parser.add_argument("--last", action="store_true", help="compare with the reference's last frame, at every time")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="use every K-th frame only")
    parser.add_argument("--start", type=float, metavar="T", help="first time of the rate's window")
    parser.add_argument("--stop", type=float, metavar="T", help="last time of the rate's window")
    parser.add_argument("--out", metavar="STORE", help="store the series as a Zarr dataset")
    parser.add_argument("--figure", metavar="FILE", help="draw them (png, pdf, svg)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")


def _verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "items", metavar="ITEM", nargs="*", help="names of statements (--list), or numbers of documents; all for none"
    )
    parser.add_argument("--quick", action="store_true", help="fewer particles and replicas: three minutes on two cores")
    parser.add_argument("--self-test", action="store_true", help="plant a fault in each: all must be caught")
    parser.add_argument("--list", action="store_true", help="the statements, and nothing measured")
    parser.add_argument("--workers", type=int, metavar="K", help="processes that share the work (as many as cores)")
    parser.add_argument("--json", metavar="FILE", help="write all that was found")
    parser.add_argument("--out", metavar="STORE", help="store it as a Zarr dataset")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --json or --out")


def _command(commands: Any, name: str, function: Callable[..., int | None], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=function)
    return parser


def _scenario(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("scenario", metavar="SCENARIO", help="built-in name, or path/to/file.py:ClassName")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="set a field of the scenario; repeatable"
    )
    parser.add_argument(
        "--as",
        dest="member",
        metavar="DYNAMICS",
        help="run the scenario's energy under gradient_flow, langevin, kinetic, birth_death or noisy_sgd; their own "
        "fields (alpha, gamma, batch_size, ...) are set with --set too",
    )
    return parser


def _settings(parser: argparse.ArgumentParser) -> None:
    for option, (name, kind, text) in SETTINGS.items():
        if kind is None:
            parser.add_argument(f"--{option}", dest=name, action="store_true", default=None, help=text)
            continue
        parser.add_argument(f"--{option}", dest=name, type=kind, metavar=option.upper().split("-")[-1], help=text)
    parser.add_argument(
        "--observe",
        action="append",
        metavar="NAME",
        help="record mean, covariance, energy, confinement, entropy or free_energy; repeatable",
    )


def _list(options: argparse.Namespace) -> None:
    from .scenarios import BUILT_IN

    width = max(map(len, BUILT_IN))
    for name, (_, text) in BUILT_IN.items():
        print(f"{name:<{width}}  {text}")


def _info(options: argparse.Namespace) -> None:
    import dataclasses
    import inspect

    from .model import fields

    scenario = _built(options)
    print(inspect.getdoc(type(scenario)) or type(scenario).__name__)
    print("\nfields (--set NAME=VALUE):")
    for name, value in fields(scenario).items():
        print(f"  {name} = {value!r}")
    if any(not f.init for f in dataclasses.fields(scenario)):
        print("  (fields that are computed cannot be set)")
    present = [name for name in OPTIONAL if hasattr(scenario, name)]
    print(f"\nalso defines: {', '.join(present) or 'nothing beyond the equation'}")
    print("\nsuggested settings:")
    for name, value in _suggested(scenario).items():
        print(f"  {name} = {value!r}")


def _run(options: argparse.Namespace) -> None:
    from . import simulate

    scenario = _built(options)
    settings = _chosen(scenario, options)
    if settings.get("checkpoint_every") is None and 0 < settings["dt"] <= settings["horizon"] < float("inf"):
        settings["checkpoint_every"] = max(1, round(settings["horizon"] / settings["dt"] / CHECKPOINTS))
    budget = _budget(options)
    run = simulate(scenario, store=options.out, overwrite=options.overwrite, progress=True, memory=budget, **settings)
    _report(run, options.out)


def _plan(options: argparse.Namespace) -> None:
    from . import plan

    scenario = _built(options)
    found = plan(scenario, store=options.out, memory=_budget(options), **_chosen(scenario, options))
    # What does not fit is told as the error.
    print(str(found).splitlines()[0])
    found.check()


def _budget(options: argparse.Namespace) -> float | None:
    """Bytes of --memory."""
    return None if options.memory is None else 1e9 * float(options.memory)


def _resume(options: argparse.Namespace) -> None:
    from . import open_run, resume

    if _is_limit(open_run(options.store)):
        raise UsageError(f"{options.store} is a limit, which is stored as a whole; there is nothing to resume.")
    _report(resume(options.store, progress=True), options.store)


def _is_limit(data: xr.Dataset) -> bool:
    """Whether a stored dataset is a law, and not a run of particles."""
    return "n_particles" not in data.coords


def _sweep(options: argparse.Namespace) -> None:
    from pathlib import Path

    from . import sweep

    scenario = _built(options)
    over = _axes(scenario, options.over)
    twice = [name for name in over if getattr(options, name, None) is not None]
    twice += [name for name, _ in map(_assignment, options.set) if name in over]
    if twice:
        raise UsageError(f"{', '.join(twice)} is both swept and set; leave one out.")
    settings = {k: v for k, v in _chosen(scenario, options, swept=over).items() if k not in over}
    if not settings.get("observables") and not hasattr(scenario, "observables"):
        raise UsageError("the table of this sweep would be empty; say what to record, for instance --observe mean.")
    folder = Path(options.out)
    settings |= {"store": folder, "memory": _budget(options), "workers": options.workers}
    table = sweep(scenario, over, reduce=_observables_only, progress=True, **settings)
    table.to_zarr(folder / "table.zarr", mode="w", zarr_format=3, consolidated=False)
    print(table)
    print(f"stored in {folder / 'table.zarr'}, one run each beside it")


def _limit(options: argparse.Namespace) -> None:
    _check_limit(options)
    scenario = _built(options)
    if options.stationary:
        _print_stationary(scenario, options)
        return
    drawn = REQUIRED if options.figure else ("horizon",)
    of_noise = ("seed", "n_replicas", "substeps") if hasattr(scenario, "common_diffusion") else ()
    settings = _chosen(scenario, options, required=drawn, only=() if options.figure else ("horizon", "dt", *of_noise))
    if not settings["horizon"] > 0:
        raise UsageError(f"--horizon {settings['horizon']:g}: expected a positive time.")
    from .limit import evolve

    every, times = _frames(settings, options.frames)
    shared: dict[str, Any] = {}
    if hasattr(scenario, "common_diffusion"):
        shared = {k: settings.get(k) for k in ("dt", "seed", "noise")}
        shared["n_replicas"] = settings.get("n_replicas", 1)
    found = evolve(
        scenario, times, n_nodes=options.nodes, store=options.out, overwrite=options.overwrite, progress=True, **shared
    )
    _print_limit(found)
    if options.out:
        print(f"stored in {options.out}: mfsde.open_run({options.out!r})")
    if options.figure:
        _draw_limit(scenario, found, settings, every, options.figure)


def _check_limit(options: argparse.Namespace) -> None:
    from pathlib import Path

    _check_figure(options)
    if options.frames < 1:
        raise UsageError(f"--frames {options.frames}: expected a number of times, 1 or more.")
    if options.out and Path(options.out).exists() and not options.overwrite:
        raise UsageError(f"--out {options.out} exists; choose another, or pass --overwrite.")
    if options.nodes is not None and options.nodes < 5:
        raise UsageError(f"--nodes {options.nodes}: expected 5 nodes or more.")
    if options.stationary and (options.out or options.figure):
        raise UsageError("--stationary prints the stationary laws; --out and --figure belong to the law in time.")


def _check_figure(options: argparse.Namespace) -> None:
    from pathlib import Path

    if options.figure and Path(options.figure).suffix not in FIGURES:
        raise UsageError(f"--figure {options.figure}: expected a file that ends in {', '.join(FIGURES)}.")
    if options.figure and not Path(options.figure).parent.is_dir():
        raise UsageError(f"--figure {options.figure}: there is no folder {Path(options.figure).parent}; make it first.")


def _frames(settings: dict[str, Any], frames: int) -> tuple[int | None, list[float]]:
    """Steps between two times, and the times: whole steps of a run where its dt is known."""
    horizon, dt = settings["horizon"], settings.get("dt")
    if not dt:
        return None, [horizon * k / frames for k in range(frames + 1)]
    n_steps = max(1, round(horizon / dt))
    # As many frames as asked for, or the next number that divides the steps.
    frames = next(k for k in range(min(frames, n_steps), n_steps + 1) if n_steps % k == 0)
    every = n_steps // frames
    return every, [float(f"{step * dt:.12g}") for step in range(0, n_steps + 1, every)]


def _print_limit(found: xr.Dataset) -> None:
    """Mean, deviation, energy and errors over time; of several paths of a common noise the first."""
    import numpy as np

    print(f"{found.attrs['scenario']} by {found.attrs['method']}: {dict(found.sizes)}")
    first = found.isel(replica=0) if "replica" in found["mean"].dims else found
    columns = {"t": first["time"].values}
    shown = min(SHOWN, first.sizes["component"])
    for k in range(shown):
        tail = f"[{k}]" if first.sizes["component"] > 1 else ""
        columns[f"mean{tail}"] = first["mean"].values[:, k]
        columns[f"deviation{tail}"] = np.sqrt(np.maximum(first["covariance"].values[:, k, k], 0.0))
    columns |= {name: first[name].values for name in ("energy", "free_energy", "dissipation") if name in first}
    if "mean_error" in first:
        columns["mean error"] = first["mean_error"].values.max(-1)
    if "residual" in first and "density" in first:
        columns["|dm/dt|"] = first["residual"].values
    print("  ".join(f"{name:>12}" for name in columns))
    for row in zip(*columns.values(), strict=True):
        print("  ".join(f"{value:12.6g}" for value in row))
    if shown < first.sizes["component"]:
        print(f"(the first {shown} of {first.sizes['component']} components)")


def _print_stationary(scenario: Any, options: argparse.Namespace) -> None:
    from .limit import gibbs_all

    laws = gibbs_all(scenario, n_nodes=options.nodes)
    print(f"{type(scenario).__name__}: {len(laws)} stationary law{'s' if len(laws) > 1 else ''} found")
    names = ("mean", "deviation", "free energy", "residual", "feedback")
    print("  ".join(f"{name:>{28 if laws[0].dim > 1 and k < 2 else 12}}" for k, name in enumerate(names)))
    for law in laws:
        cells = [_numbers(law.mean.tolist()), _numbers(law.cov.diagonal().sqrt().tolist())]
        cells += ["-" if law.free_energy is None else f"{law.free_energy:.8g}", f"{law.residual:.2g}"]
        widths = (28 if law.dim > 1 else 12,) * 2 + (12,) * 3
        print("  ".join(f"{c:>{w}}" for c, w in zip([*cells, f"{law.feedback:.8g}"], widths, strict=True)))
    print("feedback below 1: the law is stable against small changes of itself")


def _numbers(values: list[float]) -> str:
    # What rounding leaves of a zero would only distract.
    return ", ".join(f"{0.0 if abs(value) < ZERO else value:.8g}" for value in values)


def _draw_limit(scenario: Any, found: xr.Dataset, settings: dict[str, Any], every: int | None, file: str) -> None:
    from . import simulate
    from .analysis import plots

    if "density" not in found and ("position" not in found or found.sizes["component"] > 1):
        raise UsageError(
            f"--figure {file}: the limit of {type(scenario).__name__} was made by {found.attrs['method']} and has no "
            "law of one or two components to draw particles under; store it with --out instead."
        )
    run = simulate(scenario, progress=True, **{**settings, "save_every": every, "store": None})
    plots.limit(run, found).savefig(file, dpi=130)
    print(f"drawn in {file}: {settings['n_particles']} particles under their limit")


def _analyse(options: argparse.Namespace) -> None:
    from . import open_run, provenance
    from .analysis.overview import overview
    from .store import read_settings

    _check_analyse(options)
    run = open_run(options.store).isel(time=slice(None, None, options.every))
    if _is_limit(run):
        raise UsageError(
            f"{options.store} is a limit, not a run; compare a run with it: mfsde analyse RUN --reference "
            f"{options.store}."
        )
    described = read_settings(options.store)
    scenario = None
    try:
        scenario = provenance.rebuild(described)
    except provenance.CannotRebuild as problem:
        if not options.reference:
            raise UsageError(f"{problem}; compare with another run: --reference STORE.") from problem
    if scenario is not None and provenance.source_digest(type(scenario)) != described.get("scenario_source"):
        print(f"note: {described['scenario']} is not what it was when the run was made; its present laws are used.")
    reference = None
    if options.reference:
        reference = open_run(options.reference)
        reference = reference if options.last else reference.isel(time=slice(None, None, options.every))
    window = {"start": options.start, "stop": options.stop}
    found = overview(run, scenario, to=options.to, reference=reference, last=options.last, **window)
    print(found.table())
    if options.out:
        found.dataset().to_zarr(options.out, mode="w", zarr_format=3, consolidated=False)
        print(f"stored in {options.out}: xarray.open_zarr({options.out!r}, consolidated=False)")
    if options.figure:
        from .analysis import plots

        figure = plots.summary(run, found.measured["distance"], found.rate, law=found.law)
        figure.savefig(options.figure, dpi=130)
        print(f"drawn in {options.figure}")


def _verify(options: argparse.Namespace) -> int:
    import os
    from pathlib import Path

    _check_verify(options)
    from .analysis.check import HOLDS, UNFOUNDED
    from .verification import catalogue, dataset, report, verify

    try:
        wanted = catalogue.chosen(options.items)
    except ValueError as problem:
        raise UsageError(str(problem)) from problem
    if options.list:
        print("\n".join(f"{what.name:24s} {what.source:44s} {what.statement}" for what in wanted))
        return 0
    workers = options.workers or min(len(wanted), os.cpu_count() or 1)
    shown: list[Any] = []

    def found(result: Any) -> None:
        shown.append(result)
        print((report.self_test_row if options.self_test else report.rows)(result), flush=True)

    settings = {"quick": options.quick, "faulty": options.self_test}
    try:
        results = verify(*options.items, workers=workers, found=found, **settings)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"interrupted after {len(shown)} of {len(wanted)} items; nothing was stored") from stop
    print(f"\n{(report.caught if options.self_test else report.summary)(results)}")
    if options.json:
        Path(options.json).write_text(report.as_json(results, **settings, workers=workers), encoding="utf-8")
        print(f"written to {options.json}")
    if options.out:
        dataset(results).to_zarr(options.out, mode="w", zarr_format=3, consolidated=False)
        print(f"stored in {options.out}: xarray.open_zarr({options.out!r}, consolidated=False)")
    if options.self_test:
        return int(not all(result.caught for result in results))
    # Of a statement whose hypotheses fail nothing is refuted.
    return int(any(result.verdict not in (HOLDS, UNFOUNDED) for result in results))


def _check_verify(options: argparse.Namespace) -> None:
    """Refuses what could only fail, or harm, after the work is done."""
    from pathlib import Path

    if options.workers is not None and options.workers < 1:
        raise UsageError(f"--workers {options.workers}: expected a number of processes, 1 or more.")
    if options.list and (options.json or options.out):
        raise UsageError("--list measures nothing; --json and --out belong to what is measured.")
    if options.json:
        file = Path(options.json)
        if file.is_dir():
            raise UsageError(f"--json {file} is a folder; expected a file.")
        if not file.parent.is_dir():
            raise UsageError(f"--json {file}: there is no folder {file.parent}; make it first.")
        if options.out and file.resolve() == Path(options.out).resolve():
            raise UsageError(f"--json and --out are both {file}; give them two names.")
        if file.exists() and not options.overwrite:
            raise UsageError(f"--json {file} exists; choose another, or pass --overwrite.")
    if options.out and Path(options.out).exists():
        _check_replaced(Path(options.out), "verification", options.overwrite)


def _check_analyse(options: argparse.Namespace) -> None:
    """Refuses what could only fail, or harm, after the work is done."""
    from pathlib import Path

    if options.last and not options.reference:
        raise UsageError("--last chooses a frame of --reference STORE, which is missing.")
    if options.to and options.reference:
        raise UsageError("--to and --reference are two things to compare with; leave one out.")
    if options.every < 1:
        raise UsageError(f"--every {options.every}: expected a number of frames, 1 or more.")
    _check_figure(options)
    if options.out and Path(options.out).exists():
        inputs = [Path(store).resolve() for store in (options.store, options.reference) if store]
        if Path(options.out).resolve() in inputs:
            raise UsageError(f"--out {options.out} is a run that is analysed; choose another.")
        _check_replaced(Path(options.out), "analysis", options.overwrite)


def _check_replaced(out: Path, kind: str, overwrite: bool) -> None:
    """An earlier result of this kind may be replaced when asked; nothing else may."""
    import json

    try:
        attributes = json.loads((out / "zarr.json").read_text()).get("attributes", {})
    except (OSError, ValueError):
        attributes = {}
    if not attributes.get("long_name", "").startswith(f"{kind} of "):
        raise UsageError(f"--out {out} exists and is no {kind}; choose another, or remove it yourself.")
    if not overwrite:
        raise UsageError(f"--out {out} exists; choose another, or pass --overwrite.")


def _observables_only(run: xr.Dataset) -> xr.Dataset:
    """Positions stay in the run's own store; the table holds what fits together for every N."""
    return run.drop_dims("particle", errors="ignore")


def _built(options: argparse.Namespace) -> Any:
    """The scenario with its fields set."""
    import dataclasses

    from .provenance import load_class

    if ":" in options.scenario:
        cls = load_class(options.scenario)
    else:
        from . import scenarios

        if options.scenario.endswith(".py"):
            raise UsageError(f"{options.scenario} names no class; write {options.scenario}:ClassName.")
        if options.scenario not in scenarios.BUILT_IN:
            raise UsageError(
                f"there is no built-in scenario {options.scenario!r}; expected one of "
                f"{', '.join(scenarios.BUILT_IN)}, or path/to/file.py:ClassName."
            )
        cls = getattr(scenarios, options.scenario)
    if not dataclasses.is_dataclass(cls):
        raise UsageError(f"{options.scenario} is not a dataclass; put @dataclass(frozen=True) above its definition.")
    given = dict(map(_assignment, options.set))
    if options.member is None:
        return _with_fields(cls, given)
    from . import family

    if options.member not in family.MEMBERS:
        raise UsageError(f"--as {options.member}: expected one of {', '.join(family.MEMBERS)}.")
    member, preset = family.MEMBERS[options.member]
    # A name that both have is the dynamics' own, as for a sweep.
    own = {f.name for f in dataclasses.fields(member)} - {"of"}
    inner = _with_fields(cls, {name: text for name, text in given.items() if name not in own})
    return _with_fields(member, {name: text for name, text in given.items() if name in own}, of=inner, **preset)


def _with_fields(cls: type, texts: dict[str, str], **values: Any) -> Any:
    """An instance with fields from the text of --set, and others as they are."""
    import dataclasses

    known = {f.name: f for f in dataclasses.fields(cls) if f.init and f.name != "of"}
    given = {name: _as_field(cls, known, name, text) for name, text in texts.items()}
    missing = [
        f.name
        for f in known.values()
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in {**values, **given}
    ]
    if missing:
        raise UsageError(f"{cls.__name__} needs {', '.join(f'--set {name}=...' for name in missing)}.")
    return cls(**{**values, **given})


def _as_field(cls: type, known: dict[str, Any], name: str, text: str) -> Any:
    """The text as a value of the type that the field's annotation names, if it is a plain one."""
    if name not in known:
        raise UsageError(f"{cls.__name__} has no field {name!r}; its fields are {', '.join(known) or 'none'}.")
    annotation = known[name].type
    plain, _, optional = (annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")).partition(
        " | None"
    )
    kind = object if optional else PLAIN.get(plain, object)
    value = text if kind is str else _literal(text)
    if value is None and str(annotation).endswith("| None"):
        return None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (int, float, bool) and type(value) is not kind:
        raise UsageError(f"--set {name}={text}: expected a {kind.__name__}, got {value!r}.")
    return value


def _assignment(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise UsageError(f"--set {text}: expected FIELD=VALUE, for instance --set sigma=0.5.")
    return name.strip(), value.strip()


def _literal(text: str) -> Any:
    """A number, tuple, True, None, ...; the text itself where it is none of these."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _axes(scenario: Any, texts: Sequence[str]) -> dict[str, list[Any]]:
    """The swept names and their values."""
    import dataclasses

    known = {f.name: f for f in dataclasses.fields(scenario) if f.init}
    axes: dict[str, list[Any]] = {}
    for text in texts:
        name, sign, values = text.partition("=")
        if not sign or not values:
            raise UsageError(f"--over {text}: expected NAME=V1,V2,..., for instance --over sigma=0.5,0.7,1.")
        setting = SETTINGS.get(name.replace("_", "-"), (name,))[0]
        if setting in axes:
            raise UsageError(f"--over {name} is given twice; list all its values in one: --over {name}=V1,V2,...")
        parts = values.split(",")
        if setting in known:
            axes[setting] = [_as_field(type(scenario), known, setting, part) for part in parts]
        else:
            axes[setting] = [_dtype(part) if setting == "dtype" else _literal(part) for part in parts]
    return axes


def _dtype(name: str, option: str = "--dtype") -> Any:
    import torch

    if name not in ("float32", "float64"):
        raise UsageError(f"{option} {name}: expected float32 or float64.")
    return getattr(torch, name)


def _suggested(scenario: Any) -> dict[str, Any]:
    return dict(scenario.suggested()) if hasattr(scenario, "suggested") else {}


def _chosen(
    scenario: Any,
    options: argparse.Namespace,
    swept: Sequence[str] | dict[str, Any] = (),
    required: Sequence[str] = REQUIRED,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Settings of the call, completed by the scenario's suggestions (all, or some only), which are printed."""
    given = {name: getattr(options, name) for name, _, _ in SETTINGS.values() if getattr(options, name) is not None}
    suggested = {k: v for k, v in _suggested(scenario).items() if k not in given and k not in swept}
    suggested = {k: v for k, v in suggested.items() if not only or k in only}
    if options.observe:
        given["observables"] = tuple(options.observe)
        suggested.pop("observables", None)
    if suggested:
        print(f"suggested by {type(scenario).__name__}: " + ", ".join(f"{k}={v}" for k, v in suggested.items()))
    settings = {**suggested, **given}
    if "method" not in settings and "method" not in swept and not only:
        from .methods import suited

        if (method := suited(scenario)) != "euler":
            print(f"{type(scenario).__name__} is stepped by method={method}, unless --method says otherwise")
            settings["method"] = method
    missing = [name for name in required if name not in settings and name not in swept]
    if missing:
        flags = {name: option for option, (name, _, _) in SETTINGS.items()}
        raise UsageError(
            f"{type(scenario).__name__} suggests no {', '.join(missing)}; each changes the result, so pass "
            f"{' '.join('--' + flags[name] for name in missing)}."
        )
    if "dtype" in given:
        settings["dtype"] = _dtype(given["dtype"])
    if "precision" in given:
        settings["precision"] = _dtype(given["precision"], "--noise-precision")
    of_noise = {k: settings.pop(k) for k in ("substeps", "antithetic", "precision") if k in settings}
    if of_noise:
        if "seed" in swept:
            told = ", ".join(f"--{option}" for option, (name, _, _) in SETTINGS.items() if name in of_noise)
            raise UsageError(f"{told} fixes the noise of one seed; it cannot be combined with --over seed=...")
        from . import Noise

        settings["noise"] = Noise(settings["seed"], **of_noise)
    return settings


def _report(run: xr.Dataset, store: str) -> None:
    print(run)
    print(f"stored in {store}: mfsde.open_run({store!r}), or xarray.open_zarr({store!r}, consolidated=False)")


if __name__ == "__main__":
    sys.exit(main())
