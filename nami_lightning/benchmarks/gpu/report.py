"""``lightning bench gpu``: one report of what this machine's GPU was seen to do, each promise as held or not."""

import platform
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import torch

from nami_lightning.benchmarks.gpu.parity import CHECKS, Skipped
from nami_lightning.benchmarks.gpu.sampling_speed import measure_sampling_speed
from nami_lightning.benchmarks.gpu.section import Promise, Section
from nami_lightning.benchmarks.gpu.sizes import GPU, STAND_IN, Sizes
from nami_lightning.benchmarks.gpu.training_run import train_emoji
from nami_lightning.benchmarks.gpu.training_speed import measure_training_speed
from nami_lightning.errors import first_line
from nami_lightning.utils.atomic_write import write_text
from nami_lightning.utils.text_table import markdown_table

PACKAGES = ("torch", "lightning", "diffusers", "transformers", "nami_lightning")


def check_parity(sizes: Sizes, folder: Path) -> Section:
    """Run all checks of parity; one that fails to run is a promise that is not held."""
    promises = []
    for check in CHECKS:
        try:
            promises += check(sizes.device)
        except Skipped as reason:
            promises.append(Promise(_title(check), f"not run: {reason}", "", None))
        except Exception as error:
            traceback.print_exc()
            promises.append(Promise(_title(check), f"failed: {first_line(error)[:200]}", "runs", False))
    text = (
        "Relative differences: the norm of the difference over the norm of the reference, which is the CPU's float32."
    )
    return Section("Parity", text, promises=promises)


SECTIONS: dict[str, Callable[[Sizes, Path], Section]] = {
    "parity": check_parity,
    "sampling": measure_sampling_speed,
    "training": measure_training_speed,
    "run": train_emoji,
}


@dataclass
class Report:
    """What was measured so far; it is written anew after each section, so that none is lost.

    Attributes:
        path: of the Markdown file; pictures lie beside it.
        sizes: what is measured.
        sections: those that ended, with the seconds that they took.
    """

    path: Path
    sizes: Sizes
    sections: list[tuple[Section, float]] = field(default_factory=list)

    def run(self, name: str) -> None:
        """Run a section; one that fails is in the report with its error."""
        print(f"{name} ...", flush=True)
        begin = perf_counter()
        try:
            section = SECTIONS[name](self.sizes, self.path.parent)
        except Exception as error:
            traceback.print_exc()
            section = Section(
                name.capitalize(), promises=[Promise(name, f"failed: {first_line(error)[:200]}", "runs", False)]
            )
        self.sections.append((section, perf_counter() - begin))
        write_text(self.path, self.render())

    def render(self) -> str:
        """Return the report as Markdown."""
        promises = [promise for section, _ in self.sections for promise in section.promises]
        counts = {
            word: sum(promise.verdict == word for promise in promises) for word in ("held", "not held", "not run")
        }
        lines = [
            f"# What {self.sizes.title} does",
            f"{describe_machine(self.sizes)}. Written by `lightning bench gpu`"
            f"{' --stand_in: small sizes on a CPU, no figure of a GPU' if self.sizes.device.type == 'cpu' else ''}.",
            f"Promises: {', '.join(f'{number} {word}' for word, number in counts.items())}.",
        ]
        for section, seconds in self.sections:
            lines += [f"## {section.title}", *([section.text] if section.text else []), *section.tables]
            if section.promises:
                lines.append(
                    markdown_table(["promise", "measured", "goal", "verdict"], [p.row for p in section.promises])
                )
            lines += [f"![{section.title}]({picture})" for picture in section.pictures]
            lines.append(f"This section took {seconds:.0f} s.")
        return "\n\n".join(lines) + "\n"


def describe_machine(sizes: Sizes) -> str:
    """Return the device, the driver's CUDA, and the versions of the packages that matter, in one line."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    where = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    if sizes.device.type != "cuda":
        return f"CPU with {torch.get_num_threads()} thread(s), {where}; {versions}"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{torch.cuda.get_device_name(0)} ({memory:.0f} GiB), CUDA {torch.version.cuda}, {where}; {versions}"


def measure_gpu(options: Namespace) -> None:
    """Measure this machine's GPU, and write the report.

    Args:
        options: ``output``, the report's path; ``sections`` of :data:`SECTIONS`; ``minutes`` of the training run;
            ``stand_in``: run small on the CPU instead; ``overrides``: keys of the recipe of that run.

    Raises:
        ValueError: no GPU is there, and no stand-in is asked for.
    """
    if not options.stand_in and not torch.cuda.is_available():
        raise ValueError("lightning bench gpu needs a CUDA GPU: --stand_in runs the same flow small on the CPU")
    sizes = STAND_IN if options.stand_in else GPU
    sizes = replace(sizes, run=(*sizes.run, *options.overrides), minutes=options.minutes or sizes.minutes)
    report = Report(Path(options.output), sizes)
    report.path.parent.mkdir(parents=True, exist_ok=True)
    for name in options.sections:
        report.run(name)
    print(f"Wrote {report.path}")


def _title(check: Callable[..., object]) -> str:
    return check.__name__.replace("_", " ")
