"""A sweep: the runs of a small YAML file one after another, then their comparison.

    output_dir: runs/components     where the runs live
    by: flops                       what the comparison is by: steps, samples, flops, time
    overrides: {seed: 1}            laid over every recipe
    runs:
      - {recipe: ../openmoji.yaml, name: nami}
      - recipe: ../openmoji.yaml
        name: no_residual_noise
        overrides: {model: {bridge: {init_args: {residual_noise: false}}}}

A recipe is a file beside the sweep's, or the name of a packaged one; overrides are pieces of a recipe. Each run is a
process of its own, so one that fails does not end the others. Run again, finished runs are left alone, the rest go on.
Sweeps of one output_dir share the runs that they call the same.
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

from nami_lightning.comparison.compare import AXES
from nami_lightning.runs.preemption import INTERRUPTED, REQUEUE, SIGNALS
from nami_lightning.runs.recipe import RECIPES, Recipe
from nami_lightning.runs.run_dir import Run, step_of


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Args:
        recipe: path beside the sweep's file, or the name of a packaged recipe.
        name: the run's folder below ``output_dir``.
        overrides: a piece of a recipe, laid over it.
    """

    recipe: str
    name: str
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """A list of runs.

    Args:
        output_dir: where the runs live.
        runs: at least one, all names different.
        by: what they are compared by.
        overrides: laid over every recipe, below a run's own.
    """

    output_dir: str
    runs: list[SweepRun]
    by: str = "flops"
    overrides: dict[str, Any] = field(default_factory=dict)


def find_sweep(name: str) -> Path:
    """The sweep at the path ``name``, or the packaged one of that name.

    Raises:
        FileNotFoundError: naming the packaged ones.
    """
    experiments = RECIPES / "experiments"
    for candidate in (Path(name), experiments / name, experiments / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(path.stem for path in experiments.glob("*.yaml")))
    raise FileNotFoundError(f"no sweep {name}; give a YAML file with a list of runs, or one of: {known}")


def load_sweep(path: Path) -> Sweep:
    """Read a sweep's file.

    Raises:
        ValueError: it isn't YAML, has an unknown key or lacks one, or two runs share a name.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    values = _checked(Sweep, content, str(path))
    if not isinstance(values["runs"], list) or not values["runs"]:
        raise ValueError(f"{path}: runs must be a list of at least one run")
    values["runs"] = [
        SweepRun(**_checked(SweepRun, run, f"{path}: runs[{index}]")) for index, run in enumerate(values["runs"])
    ]
    sweep = Sweep(**values)
    if sweep.by not in AXES:
        raise ValueError(f"{path}: by must be one of {', '.join(AXES)}; got {sweep.by}")
    names = [run.name for run in sweep.runs]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: several runs are called {doubled[0]}; a run's name is its folder")
    return sweep


def _checked(kind: type, content: Any, where: str) -> dict[str, Any]:
    """A mapping with the keys of a dataclass."""
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a mapping of keys to values")
    known = {one.name: one for one in fields(kind)}
    if unknown := [key for key in content if key not in known]:
        raise ValueError(f"{where}: unknown key {unknown[0]}; the keys are {', '.join(known)}")
    required = [name for name in ("output_dir", "runs", "recipe", "name") if name in known]
    if missing := [name for name in required if name not in content]:
        raise ValueError(f"{where} lacks the key {missing[0]}")
    overrides = content.get("overrides", {})
    if not isinstance(overrides, dict):
        raise ValueError(f"{where}: overrides must be a piece of a recipe")
    if own := [key for key in ("name", "output_dir") if key in overrides]:
        raise ValueError(f"{where}: {own[0]} is a key of the sweep's own, beside overrides")
    for key in ("output_dir", "recipe", "name", "by"):
        if not isinstance(content.get(key, ""), str):
            raise ValueError(
                f"{where}: {key} must be a text, in quotes if it looks like a number, not {content[key]!r}"
            )
    return dict(content)


def arguments(overrides: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """A piece of a recipe as options of ``lightning run``: ``--key.path value``."""
    for key, value in overrides.items():
        if isinstance(value, Mapping) and value:
            yield from arguments(value, f"{prefix}{key}.")
        else:
            yield f"--{prefix}{key}"
            yield value if isinstance(value, str) else json.dumps(value)


def run_arguments(sweep: Sweep, run: SweepRun, home: Path) -> list[str]:
    """What ``lightning run`` is called with for a run of the sweep, whose file lies in ``home``."""
    beside = home / run.recipe
    recipe = str(beside) if beside.is_file() else run.recipe
    own = ["--output_dir", sweep.output_dir, "--name", run.name]
    return [recipe, *arguments(sweep.overrides), *arguments(run.overrides), *own]


def train_all(path: Path) -> tuple[Sweep, list[str]]:
    """Train what isn't finished; the sweep, and the names of the runs that failed.

    All recipes are read before the first run begins, so that a misspelt key is found at once.
    """
    sweep = load_sweep(path)
    commands = {run.name: run_arguments(sweep, run, path.parent) for run in sweep.runs}
    states = {name: finished(read_recipe(command, f"{path}, run {name}")) for name, command in commands.items()}
    failed = []
    for number, (name, command) in enumerate(commands.items(), 1):
        print(f"[{number}/{len(commands)}] {name}{states[name]}", flush=True)
        if states[name]:
            continue
        code = run_to_its_end([sys.executable, "-m", "nami_lightning.cli", "run", *command])
        if code in (INTERRUPTED, REQUEUE):  # told to stop: so is the sweep
            raise SystemExit(code)
        if code:
            failed.append(name)
    return sweep, failed


def run_to_its_end(command: list[str]) -> int:
    """A command's exit status. What tells this process to stop is left to the command, which saves first.

    Ctrl-C in a terminal reaches both; the other signals are handed on.
    """
    process = subprocess.Popen(command)

    def hand_on(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_recipe(command: list[str], where: str) -> Recipe:
    """The recipe that ``lightning run`` would read.

    Raises:
        ValueError: it is wrong, and which run's it is.
    """
    try:
        return Recipe(command[0], command[1:])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def finished(recipe: Recipe) -> str:
    """What there is to say of a recipe's run that has a checkpoint of its last step; nothing of any other."""
    run = Run(recipe.folder)
    total = sum(phase.steps for phase in recipe.config.curriculum.phases)
    if not any(step_of(path) >= total for path in run.checkpoints[-1:]):
        return ""
    if run.recipe.read_text(encoding="utf-8") != recipe.dump():
        return ": finished, with another recipe than it has now; remove or rename it to train it again"
    return ": finished"
