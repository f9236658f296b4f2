"""The sbatch script: against bash, and against what SLURM is documented to take."""

import shlex
import subprocess
from pathlib import Path

import pytest

from nami_lightning.cli.argument_types import time_limit
from nami_lightning.cli.main import main

# Of sbatch's manual page; all that a script of ours may hold.
OPTIONS = {
    *("job-name", "partition", "account", "time", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task"),
    *("signal", "chdir", "output", "open-mode", "requeue"),
}


def script(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["launch", "slurm", *arguments]) == 0
    return capsys.readouterr().out


def test_the_script_is_bash_and_starts_a_process_a_gpu(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [*tiny[1:], "--seed", "5", "--curriculum.unit", "32"]
    text = script(capsys, tiny[0], "--nodes", "8", "--gpus", "4", "--partition", "a100", "--time", "1-00:00:00", *keys)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    settings = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert settings.keys() <= OPTIONS
    assert "account" not in settings
    assert (
        settings
        | {
            "job-name": "tiny",
            "partition": "a100",
            "time": "1-00:00:00",
            "nodes": "8",
            "ntasks-per-node": "4",
            "gpus-per-node": "4",
            "cpus-per-task": "2",
            "signal": "USR1@120",
            "requeue": "",
        }
        == settings
    )
    assert Path(settings["output"]).parent == tmp_path / "runs" / "tiny" / "logs"
    assert Path(settings["output"]).parent.is_dir()
    (command,) = (shlex.split(line) for line in lines if line.startswith("srun"))
    assert command[3:6] == ["-m", "nami_lightning.cli", "run"]
    assert command[command.index("--trainer.num_nodes") + 1] == "8"
    assert command[command.index("--trainer.devices") + 1] == "4"
    assert command[command.index("--seed") + 1] == "5"


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (0, False), (1, False)])
def test_it_is_queued_again_if_the_run_asks_for_it(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, requeued: bool
) -> None:
    """Run by bash, with programs that stand in for SLURM's."""
    text = script(capsys, *tiny, "--nodes", "1", "--gpus", "1")
    for name, body in (("srun", f"exit {status}"), ("scontrol", f'echo "$@" > {tmp_path}/asked')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "2"}
    done = subprocess.run(["bash"], input=text, text=True, env=environment, check=False)
    assert done.returncode == status
    assert (tmp_path / "asked").exists() == requeued
    assert not requeued or (tmp_path / "asked").read_text() == "requeue 17\n"


@pytest.mark.parametrize("own", [None, "max_split_size_mb:512"])
def test_memory_is_allocated_in_segments_that_grow_unless_told_otherwise(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], own: str | None
) -> None:
    text = script(capsys, *tiny, "--nodes", "1", "--gpus", "1")
    (tmp_path / "srun").write_text(f'#!/bin/bash\necho "$PYTORCH_ALLOC_CONF" > {tmp_path}/said\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "2"}
    environment |= {"PYTORCH_ALLOC_CONF": own} if own else {}
    subprocess.run(["bash"], input=text, text=True, env=environment, check=True)
    assert (tmp_path / "said").read_text() == f"{own or 'expandable_segments:True'}\n"


def test_a_wrong_recipe_is_refused_before_it_is_queued(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "slurm", *tiny, "--nodes", "1", "--gpus", "1", "--curriculum.units", "2"]) == 2
    assert "did you mean curriculum.unit" in capsys.readouterr().err.replace("--", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "3"], "stage 1: 8 samples a step can't be split evenly over 3 rank(s)"),
        (["--gpus", "1", "--nodes", "5"], "can't be split evenly over 5 rank(s)"),
        (["--gpus", "1", "--model.transformer.init_args.num_layers", "[1, 0]"], "need one number a stage"),
        (["--gpus", "1", "--resolutions", "[8, 16]"], "must have one number a stage"),
        (["--gpus", "1", "--trainer.precision", "16"], "trainer.precision 16-mixed is not supported: use 32-true"),
        (["--gpus", "0"], "0 is not a whole number of at least 1"),
        (["--gpus", "1", "--nodes", "-1"], "-1 is not a whole number of at least 1"),
        (["--gpus", "1", "--cpus", "0"], "0 is not a whole number of at least 1"),
        (["--gpus", "1", "--time", "1 day"], "1 day is no time that sbatch takes: MINUTES, MINUTES:SECONDS"),
        (["--gpus", "1", "--time", "24h"], "24h is no time that sbatch takes"),
        (["--gpus", "1", "--time", "1-"], "1- is no time that sbatch takes"),
        (["--gpus", "1", "--time", "1:00:00:00"], "1:00:00:00 is no time that sbatch takes"),
        (["--gpus", "1", "--time", "2"], "2 is 120 seconds, but a job is asked to save its checkpoint 120 seconds"),
        (["--gpus", "1", "--time", "0:01:30"], "0:01:30 is 90 seconds"),
    ],
)
def test_what_the_run_or_sbatch_would_refuse_is_refused_now(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    nodes = [] if "--nodes" in arguments else ["--nodes", "1"]
    file = tmp_path / "job.sh"
    try:
        code: object = main(["launch", "slurm", *tiny, *nodes, *arguments, "--output", str(file)])
    except SystemExit as error:  # of argparse
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not file.exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("time", ["90", "90:30", "24:00:00", "2-00", "2-12:30", "2-12:30:00", "0", "unlimited"])
def test_every_form_of_time_that_sbatch_takes_is_taken(time: str) -> None:
    assert time_limit(time) == time


@pytest.mark.parametrize("precision", ["16", "bf16-true", "64"])
def test_all_commands_refuse_the_same_precision_with_the_same_message(
    tiny: list[str], capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    said = set()
    for command in (["run"], ["plan"], ["launch", "slurm", "--nodes", "1", "--gpus", "1"]):
        name, *options = command
        keys = [*options[:1], tiny[0], *options[1:]] if options else [tiny[0]]
        assert main([name, *keys, *tiny[1:], "--trainer.precision", precision]) == 2
        said.add(capsys.readouterr().err.splitlines()[-1])
    assert len(said) == 1
    assert "is not supported: use 32-true, or bf16-mixed" in said.pop()
    assert not (Path(tiny[2])).exists()


def test_words_with_spaces_are_quoted_for_sbatch(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = script(capsys, *tiny, "--nodes", "1", "--gpus", "1", "--name", "two words")
    assert "#SBATCH --job-name='two words'" in text.splitlines()
