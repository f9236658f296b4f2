"""Two processes never train one run; a killed one does not stand in the way of the next."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from helpers.processes import start

from nami_lightning.cli.main import main
from nami_lightning.runs import lock
from nami_lightning.runs.lock import hold, is_held

TINY = Path(__file__).parents[1] / "tiny.yaml"


def train(folder: Path) -> None:
    with hold(folder):
        if os.fork() == 0:  # as a data worker: it outlives the kill of its parent
            time.sleep(60)
            os._exit(0)
        (folder.parent / "holding").touch()
        time.sleep(60)


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.5)


@pytest.fixture
def training(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Iterator[ForkServerProcess]:
    """A process, with a child, that trains the run ``tmp_path / "tiny"``."""
    (process,) = start(train, (tmp_path / "tiny",), 1, tmp_path_factory.mktemp("training") / "output")
    assert process.pid
    while not (tmp_path / "holding").exists():
        assert process.is_alive()
        time.sleep(0.01)
    (tmp_path / "holding").unlink()
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.join()


def test_a_run_is_refused_while_another_process_trains_it(training: ForkServerProcess, tmp_path: Path) -> None:
    holder = f"process {training.pid} on {socket.gethostname()}"
    with pytest.raises(RuntimeError, match=f"by {holder}: wait for it"), hold(tmp_path / "tiny"):
        pass
    assert (tmp_path / "tiny" / "lock").read_text() == holder
    assert is_held(tmp_path / "tiny") is True


def test_a_killed_run_can_go_on_at_once(training: ForkServerProcess, tmp_path: Path) -> None:
    training.kill()
    training.join()
    assert is_held(tmp_path / "tiny") is False
    with hold(tmp_path / "tiny"):
        pass


def test_what_another_machine_holds_may_be_of_a_dead_one(training: ForkServerProcess, tmp_path: Path) -> None:
    (tmp_path / "tiny" / "lock").write_text("process 1 on a-machine-that-died")
    assert is_held(tmp_path / "tiny") is None
    with pytest.warns(UserWarning, match="a-machine-that-died, unless that machine died"), hold(tmp_path / "tiny"):
        pass


def test_the_command_says_so_and_leaves_the_run_alone(
    training: ForkServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ([], ["--fresh"]):
        assert main(["run", str(TINY), "--output_dir", str(tmp_path), *options]) == 2
        assert f"being trained by process {training.pid}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
