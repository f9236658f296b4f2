"""Two processes never train one run; a killed one does not stand in the way of the next."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nami_lightning.cli.main import main
from nami_lightning.runs import lock
from nami_lightning.runs.lock import hold, is_held

TINY = Path(__file__).parents[1] / "tiny.yaml"

TRAINING = """
import os, sys, time
from pathlib import Path
from nami_lightning.runs.lock import hold
with hold(Path(sys.argv[1])):
    if os.fork() == 0:  # as a data worker: it outlives the kill of its parent
        time.sleep(60)
        os._exit(0)
    print("holding", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.5)


@pytest.fixture
def training(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process, with a child, that trains the run ``tmp_path / "tiny"``."""
    command = [sys.executable, "-c", TRAINING, str(tmp_path / "tiny")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    yield process
    subprocess.run(["kill", "-9", "--", f"-{process.pid}"], check=False)
    process.wait()


def test_a_run_is_refused_while_another_process_trains_it(training: subprocess.Popen[str], tmp_path: Path) -> None:
    holder = f"process {training.pid} on {socket.gethostname()}"
    with pytest.raises(RuntimeError, match=f"by {holder}: wait for it"), hold(tmp_path / "tiny"):
        pass
    assert (tmp_path / "tiny" / "lock").read_text() == holder
    assert is_held(tmp_path / "tiny") is True


def test_a_killed_run_can_go_on_at_once(training: subprocess.Popen[str], tmp_path: Path) -> None:
    training.send_signal(signal.SIGKILL)
    training.wait()
    assert is_held(tmp_path / "tiny") is False
    with hold(tmp_path / "tiny"):
        pass


def test_what_another_machine_holds_may_be_of_a_dead_one(training: subprocess.Popen[str], tmp_path: Path) -> None:
    (tmp_path / "tiny" / "lock").write_text("process 1 on a-machine-that-died")
    assert is_held(tmp_path / "tiny") is None
    with pytest.warns(UserWarning, match="a-machine-that-died, unless that machine died"), hold(tmp_path / "tiny"):
        pass


def test_the_command_says_so_and_leaves_the_run_alone(
    training: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ([], ["--fresh"]):
        assert main(["run", str(TINY), "--output_dir", str(tmp_path), *options]) == 2
        assert f"being trained by process {training.pid}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
