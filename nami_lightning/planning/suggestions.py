"""What would make a plan fit: the first change of settings with which it does, planned again with it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from nami_lightning.planning.inputs import Setup, Spread, largest_even
from nami_lightning.planning.plan import Plan, least_memory, make_plan, memory_limit

MOST_DEVICES = 1024


@dataclass(frozen=True)
class Remedy:
    """Settings with which a recipe fits.

    Attributes:
        settings: options of the command ``plan``, and recipe keys that ``run`` takes too.
        plan: with them.
    """

    settings: list[str]
    plan: Plan


def find_remedy(plan: Plan) -> Remedy | None:
    """The first change that makes a plan fit, planned again with it; None if there is none.

    Tried in this order, each alone and then together: recompute every block, smaller micro-batches, FSDP2, and more
    devices.
    """
    kinds: tuple[Change, ...] = (_checkpointing, _smaller_micro_batches, _fsdp2, _more_devices)
    combinations = [[kind] for kind in kinds]
    combinations += [[_fsdp2, _checkpointing], [_fsdp2, _checkpointing, _smaller_micro_batches]]
    combinations += [[_fsdp2, _checkpointing, _more_devices], [_fsdp2, _checkpointing, _more_devices, _smallest]]
    for combination in combinations:
        for setup, settings in _attempts(plan.setup, combination):
            if _hopeless(setup):
                continue
            if (tried := make_plan(setup)).fits:
                return Remedy(settings, tried)
    return None


Attempt = tuple[Setup, list[str]]
Change = Callable[[Setup], Iterator[Attempt]]
"""A setup to the ways of changing it, each with the settings that say so."""


def _hopeless(setup: Setup) -> bool:
    """Whether it can't fit whatever the activations, which take long to find."""
    return least_memory(setup) > memory_limit(setup)


def _attempts(setup: Setup, kinds: Sequence[Change]) -> Iterator[Attempt]:
    """All ways to apply a combination, one after the other; a change that is made already is left out."""
    if not kinds:
        yield setup, []
        return
    ways = kinds[0](setup)
    for changed, settings in chain([next(ways, (setup, []))], ways):
        for final, more in _attempts(changed, kinds[1:]):
            yield final, settings + more


def _checkpointing(setup: Setup) -> Iterator[Attempt]:
    if setup.activation_checkpointing != 1:
        yield replace(setup, activation_checkpointing=1), ["--model.activation_checkpointing", "1"]


def _smaller_micro_batches(setup: Setup) -> Iterator[Attempt]:
    limits = setup.max_micro_batch
    while max(limits) > 1 and not _hopeless(setup):
        largest = make_plan(setup).memory.stage
        if limits[largest] == 1:
            return
        changed = largest_even(setup, largest, limits[largest] // 2)
        limits = (*limits[:largest], changed, *limits[largest + 1 :])
        setup = replace(setup, max_micro_batch=limits)
        yield setup, ["--data.init_args.max_micro_batch", str(list(limits))]


def _smallest(setup: Setup) -> Iterator[Attempt]:
    limits = tuple(1 for _ in setup.max_micro_batch)
    yield replace(setup, max_micro_batch=limits), ["--data.init_args.max_micro_batch", str(list(limits))]


def _fsdp2(setup: Setup) -> Iterator[Attempt]:
    half = setup.number_type if setup.number_type in ("bfloat16", "float16") else "float32"
    spread = Spread("fsdp2", param_dtype=half)
    if setup.spread == spread or setup.devices == 1:
        return
    strategy = "--trainer.strategy"
    settings = [strategy, "nami_lightning.FSDP2Strategy", f"{strategy}.param_dtype", half]
    yield replace(setup, spread=spread, precision="32-true"), [*settings, "--trainer.precision", "32-true"]


def _more_devices(setup: Setup) -> Iterator[Attempt]:
    while setup.devices * 2 <= MOST_DEVICES:
        setup = replace(setup, devices=setup.devices * 2)
        try:
            limits = tuple(largest_even(setup, k, limit) for k, limit in enumerate(setup.max_micro_batch))
        except ValueError:
            return
        settings = ["--devices", str(setup.devices)]
        if limits != setup.max_micro_batch:
            settings += ["--data.init_args.max_micro_batch", str(list(limits))]
        setup = replace(setup, max_micro_batch=limits)
        yield setup, settings
