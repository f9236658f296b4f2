"""A short training of emoji on the device, and a run that goes on where another device left it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from nami_lightning.benchmarks.gpu.section import Promise, Section
from nami_lightning.benchmarks.gpu.sizes import Sizes

SHORT = "[{{steps: {steps}, ratio: [2, 1, 1], learning_rate: 0.001}}]"
"""The curriculum of a run that is resumed on another device."""

PROMPTS = ("flag: Japan", "red apple", "sun with face", "house", "red heart", "dog face", "pizza", "thumbs up")

PLAIN = ("--model.compile_blocks", "false", "--trainer.precision", "32-true", "--trainer.limit_val_batches", "0")


def lightning(*arguments: str) -> str:
    """Run a command of ``lightning`` in its own process, and return what it printed.

    Raises:
        RuntimeError: it failed; the last lines are the message.
    """
    done = subprocess.run([sys.executable, "-m", "nami_lightning.cli", *arguments], capture_output=True, text=True)
    printed = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"lightning {' '.join(arguments[:2])} ended with {done.returncode}: {_last_lines(printed)}")
    return printed


def _last_lines(printed: str) -> str:
    return " / ".join(line for line in re.split(r"[\r\n]+", printed)[-6:] if line)


def resume_elsewhere(sizes: Sizes, folder: Path) -> list[Promise]:
    """Train two steps on the CPU, two more on the device, and two more on the CPU again."""
    accelerators = ["cpu", "gpu" if sizes.device.type == "cuda" else "cpu", "cpu"]
    for number, accelerator in enumerate(accelerators, 1):
        phases = SHORT.format(steps=2 * number)
        place = ["--name", "resumed", "--output_dir", str(folder / "runs"), "--trainer.accelerator", accelerator]
        lightning("run", *sizes.run, *place, "--curriculum.unit", "1", "--curriculum.phases", phases, *PLAIN)
    checkpoints = sorted(path.name for path in (folder / "runs" / "resumed" / "checkpoints").iterdir())
    ended = any("step=0000006" in name for name in checkpoints)
    return [Promise(f"resume on {' -> '.join(accelerators)}", ", ".join(checkpoints), "6 steps in all", ended)]


def train_emoji(sizes: Sizes, folder: Path) -> Section:
    """Train :attr:`Sizes.run` for some minutes, and draw with it."""
    section = Section(
        "A training of emoji", f"`lightning run {sizes.run[0]}`, stopped after {sizes.minutes:g} minutes."
    )
    shutil.rmtree(folder / "runs", ignore_errors=True)  # of a report before this one
    section.promises += resume_elsewhere(sizes, folder)
    seconds = round(60 * sizes.minutes)
    limit = f"00:{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    runs = folder / "runs"
    printed = lightning("run", *sizes.run, "--name", "emoji", "--output_dir", str(runs), "--trainer.max_time", limit)
    waited = re.search(r"Time waiting for data: ([\d.]+)% of (\d+) s", printed)
    if waited:
        share = float(waited[1])
        section.promises.append(
            Promise("time waiting for data", f"{share:.1f}% of {waited[2]} s", "at most 5%", share <= 5)
        )
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    shutil.rmtree(folder / "emoji", ignore_errors=True)
    lightning("sample", str(runs / "emoji"), *prompts, "--output", str(folder / "emoji"), "--columns", "4")
    section.pictures.append("emoji/grid.png")
    return section
