"""Give the program inputs of chance, and count what comes of them: ``make fuzz``.

Each case is made from its number alone: ``--surface tars --first 17 --cases 1`` runs one case again.
"""

import argparse
import os
import resource
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.processes import ENVIRONMENT

os.environ.update(ENVIRONMENT | {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
MEMORY_GIB = 8
"""A case that needs more memory ends in an error."""


def main() -> int:
    """Run the cases, print the counts, and return 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="of all surfaces, or of the one that is named")
    parser.add_argument("--surface", help="run this one alone")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each surface")
    parser.add_argument("--messages", action="store_true", help="print the kinds of errors too")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_GIB * 2**30, MEMORY_GIB * 2**30))
    warnings.simplefilter("ignore")

    import torch
    from helpers.fuzz.cases import Counts, run_surface
    from helpers.fuzz.surfaces import SURFACES

    from nami_lightning.utils.text_table import table

    torch.set_num_threads(1)
    chosen = [surface for surface in SURFACES if options.surface in (None, surface.name)]
    if not chosen:
        parser.error(f"--surface must be one of: {', '.join(surface.name for surface in SURFACES)}")
    found: dict[str, Counts] = {}
    for surface in chosen:
        cases = options.cases if options.surface else round(surface.share * options.cases / 10_000)
        counts = run_surface(surface, range(options.first, options.first + cases))
        found[surface.name] = counts
        for text, seeds in counts.faults.items():
            print(f"FAULT in {surface.name}, {len(seeds)} case(s), number {seeds[0]} first: {text}", flush=True)
        if options.messages:
            for text, number in counts.messages.most_common():
                print(f"{surface.name} {number}: {text}")
    rows = [["", "cases", "right", "clear error", "fault", "seconds", "longest"]]
    for name, one in found.items():
        rows.append([name, *_numbers(one), f"{one.seconds:.0f}", f"{one.slowest:.2f}"])
    numbers = [_numbers(one) for one in found.values()]
    totals = [f"{sum(int(row[column].replace(',', '')) for row in numbers):,}" for column in range(4)]
    seconds, slowest = sum(one.seconds for one in found.values()), max(one.slowest for one in found.values())
    rows.append(["all", *totals, f"{seconds:.0f}", f"{slowest:.2f}"])
    print("\n".join(table(rows, "<>>>>>>")))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"Most memory: {memory:.2f} GiB")
    return int(any(one.faults for one in found.values()))


def _numbers(counts: "Counts") -> list[str]:  # type: ignore[name-defined]  # noqa: F821
    faults = sum(map(len, counts.faults.values()))
    return [f"{number:,}" for number in (counts.right + counts.refused + faults, counts.right, counts.refused, faults)]


if __name__ == "__main__":
    sys.exit(main())
