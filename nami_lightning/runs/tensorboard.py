"""A run's TensorBoard events: the logger that writes them into the run's folder, and how they are read again."""

from collections.abc import Callable, Sequence
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger

EVENT_FILES = "events.out.tfevents.*"


class RunTensorBoard(TensorBoardLogger):
    """Writes TensorBoard events into the run's folder, where ``lightning show`` and ``lightning compare`` read them.

    It is every recipe's logger unless the recipe names others; ``logger+:`` adds to it. The folder is the run's, so
    there is nothing to set.
    """

    def __init__(self) -> None:
        super().__init__(save_dir=".", name="", version="")

    def place(self, folder: Path) -> None:
        """Write into ``folder`` from now on."""
        self._root_dir = str(folder)


def event_folders(folder: Path) -> list[Path]:
    """Return the folders in which a run has TensorBoard events: its own, and those of a recipe's own loggers in it."""
    return sorted({path.parent for path in folder.rglob(EVENT_FILES)})


def read_scalars(folder: Path, wanted: Callable[[str], bool]) -> dict[str, list[tuple[int, float]]]:
    """Return the logged values of a run, as a list of (step, value) by name.

    A step that was trained again after a resume has the newer value.

    Args:
        folder: the run's folder.
        wanted: tells of a name whether it is returned.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for part in event_folders(folder):
        events = EventAccumulator(str(part), size_guidance={"scalars": 0, "images": 1})
        events.Reload()
        for tag in filter(wanted, events.Tags()["scalars"]):
            values = sorted(events.Scalars(tag), key=lambda event: event.wall_time)
            found.setdefault(tag, {}).update({event.step: event.value for event in values})
    return {tag: sorted(values.items()) for tag, values in sorted(found.items())}


def describe_curves(folders: Sequence[Path]) -> str:
    """Return the command that shows the curves of the runs in ``folders``; empty if there are no events."""
    places = [folder for folder in folders if event_folders(folder)]
    return f"tensorboard --logdir {places[0].parent}" if places else ""
