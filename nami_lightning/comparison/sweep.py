"""Trains the runs of a sweep, which is a short YAML file, one after the other; then they are compared.

    output_dir: runs/components     folder of the runs
    by: flops                       budget that runs are compared by: steps, samples, flops, time
    overrides: {seed: 1}            recipe keys that replace those of every recipe
    runs:
      - {recipe: ../openmoji.yaml, name: nami}
      - recipe: ../openmoji.yaml
        name: no_residual_noise
        overrides: {model: {bridge: {init_args: {residual_noise: false}}}}

A recipe is a path relative to the sweep's file, or the name of a packaged recipe; overrides are parts of a recipe. Each
run is a process of its own, so one that fails does not end the others. If the sweep is started again, finished runs are
left alone and the others resume. Sweeps with the same output_dir share the runs that have the same name.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from nami_lightning.comparison.compare import AXES, read_resolved_recipe, remove_irrelevant
from nami_lightning.errors import one_line
from nami_lightning.runs.preemption import INTERRUPTED, REQUEUE, SIGNALS
from nami_lightning.runs.recipe import RECIPES, Recipe
from nami_lightning.runs.run_dir import Run, step_of
from nami_lightning.utils.text_files import read_text


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Args:
        recipe: path relative to the sweep's file, or the name of a packaged recipe.
        name: name of the run, and of its folder below ``output_dir``.
        overrides: part of a recipe, whose keys replace those of the recipe.
    """

    recipe: str
    name: str
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """A list of runs to train and compare.

    Args:
        output_dir: folder of the runs.
        runs: at least one run, all with different names.
        by: budget that the runs are compared by.
        overrides: part of a recipe, whose keys replace those of every recipe; a run's own overrides come later.
    """

    output_dir: str
    runs: list[SweepRun]
    by: str = "flops"
    overrides: dict[str, Any] = field(default_factory=dict)


def find_sweep(name: str) -> Path:
    """Return the path of a sweep: ``name`` itself, or the packaged sweep of that name.

    Raises:
        FileNotFoundError: there is none; the message lists the packaged sweeps.
    """
    experiments = RECIPES / "experiments"
    for candidate in (Path(name), experiments / name, experiments / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(path.stem for path in experiments.glob("*.yaml")))
    raise FileNotFoundError(f"no sweep {name}; give a YAML file with a list of runs, or one of: {known}")


def load_sweep(path: Path) -> Sweep:
    """Return the sweep of a file.

    Raises:
        ValueError: the file isn't YAML, has an unknown key or lacks one, or two runs have the same name.
    """
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {one_line(error)}") from error
    values = _check_keys(Sweep, content, str(path))
    if not isinstance(values["runs"], list) or not values["runs"]:
        raise ValueError(f"{path}: runs must be a list of at least one run")
    values["runs"] = [
        SweepRun(**_check_keys(SweepRun, run, f"{path}: runs[{index}]")) for index, run in enumerate(values["runs"])
    ]
    sweep = Sweep(**values)
    if sweep.by not in AXES:
        raise ValueError(f"{path}: by must be one of {', '.join(AXES)}; got {sweep.by}")
    names = [run.name for run in sweep.runs]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: several runs have the name {duplicates[0]}; the name is also the run's folder")
    return sweep


def _check_keys(dataclass_type: type, content: Any, where: str) -> dict[str, Any]:
    """Return a mapping after checking that its keys are the fields of a dataclass."""
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a mapping of keys to values")
    known = {one.name: one for one in fields(dataclass_type)}
    if unknown := [key for key in content if key not in known]:
        raise ValueError(f"{where}: unknown key {unknown[0]}; the keys are {', '.join(known)}")
    required = [name for name in ("output_dir", "runs", "recipe", "name") if name in known]
    if missing := [name for name in required if name not in content]:
        raise ValueError(f"{where} lacks the key {missing[0]}")
    overrides = content.get("overrides", {})
    if not isinstance(overrides, dict):
        raise ValueError(f"{where}: overrides must be a part of a recipe, a mapping of keys to values")
    if reserved := [key for key in ("name", "output_dir") if key in overrides]:
        raise ValueError(f"{where}: {reserved[0]} can't be overridden; it is a key of the sweep itself")
    for key in ("output_dir", "recipe", "name", "by"):
        if not isinstance(content.get(key, ""), str):
            raise ValueError(
                f"{where}: {key} must be a string, in quotes if it looks like a number; got {content[key]!r}"
            )
    return dict(content)


def override_arguments(overrides: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a part of a recipe as options of ``lightning run``: ``--key.path value``."""
    for key, value in overrides.items():
        if isinstance(value, Mapping) and value:
            yield from override_arguments(value, f"{prefix}{key}.")
        else:
            yield f"--{prefix}{key}"
            yield value if isinstance(value, str) else json.dumps(value)


def run_arguments(sweep: Sweep, run: SweepRun, home: Path) -> list[str]:
    """Return the arguments of ``lightning run`` for a run of the sweep whose file is in the folder ``home``."""
    relative = home / run.recipe
    recipe = str(relative) if relative.is_file() else run.recipe
    name_options = ["--output_dir", sweep.output_dir, "--name", run.name]
    return [recipe, *override_arguments(sweep.overrides), *override_arguments(run.overrides), *name_options]


def train_all(path: Path) -> tuple[Sweep, list[str]]:
    """Train the runs that aren't finished, and return the sweep and the names of the runs that failed.

    All recipes are read before the first run starts, so that a misspelt key is found at once.
    """
    sweep = load_sweep(path)
    commands = {run.name: run_arguments(sweep, run, path.parent) for run in sweep.runs}
    states = {
        name: describe_if_finished(read_recipe(command, f"{path}, run {name}")) for name, command in commands.items()
    }
    failed = []
    for number, (name, command) in enumerate(commands.items(), 1):
        print(f"[{number}/{len(commands)}] {name}{states[name]}", flush=True)
        if states[name]:
            continue
        code = run_command([sys.executable, "-m", "nami_lightning.cli", "run", *command])
        if code in (INTERRUPTED, REQUEUE):  # the run was asked to stop, so the sweep stops too
            raise SystemExit(code)
        if code:
            failed.append(name)
    return sweep, failed


def run_command(command: list[str]) -> int:
    """Run a command and return its exit status.

    Signals that ask this process to stop are forwarded to the command, which saves first. Ctrl-C in a terminal reaches
    both processes anyway.
    """
    process = subprocess.Popen(command)

    def forward_signal(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            process.send_signal(number)

    before = {number: signal.signal(number, forward_signal) for number in SIGNALS}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_recipe(command: list[str], where: str) -> Recipe:
    """Return the recipe that ``lightning run`` would read.

    Raises:
        ValueError: the recipe is wrong; the message names the run.
    """
    try:
        return Recipe(command[0], command[1:])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def describe_if_finished(recipe: Recipe) -> str:
    """Return what to print about a recipe's run that has a checkpoint of its last step; "" for other runs."""
    run = Run(recipe.folder)
    total = sum(phase.steps for phase in recipe.config.curriculum.phases)
    if not any(step_of(path) >= total for path in run.checkpoints[-1:]):
        return ""
    trained, now = read_resolved_recipe(run)[0], recipe.values()
    for one in (trained, now):
        remove_irrelevant(one)
    if trained != now:
        return ": finished, but with another recipe than now; remove or rename the run to train it again"
    return ": finished"
