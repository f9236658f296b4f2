"""Finds a change of settings that makes a plan fit on its devices, and plans again with that change."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from nami_lightning.planning.inputs import Setup, Sharding, largest_even_micro_batch
from nami_lightning.planning.plan import Plan, make_plan, memory_limit, memory_without_activations

MOST_DEVICES = 1024


@dataclass(frozen=True)
class Suggestion:
    """Settings with which a recipe fits.

    Attributes:
        settings: options of ``lightning plan``, and recipe keys that ``lightning run`` takes too.
        plan: the plan with these settings.
    """

    settings: list[str]
    plan: Plan


def find_suggestion(plan: Plan) -> Suggestion | None:
    """Return the first change that makes a plan fit, with its plan; None if there is none.

    The changes are tried in this order, first alone and then combined: recompute every block, use smaller
    micro-batches, use FSDP2, use more devices. Shards over all nodes come last: the network between them is
    slow.
    """
    kinds: tuple[Change, ...] = (_checkpointing, _smaller_micro_batches, _fsdp2, _more_devices)
    combinations = [[kind] for kind in kinds]
    combinations += [[_fsdp2, _checkpointing], [_fsdp2, _checkpointing, _smaller_micro_batches]]
    combinations += [[_fsdp2_over_all], [_fsdp2_over_all, _checkpointing]]
    combinations += [[_fsdp2_over_all, _checkpointing, _more_devices]]
    combinations += [[_fsdp2_over_all, _checkpointing, _more_devices, _smallest]]
    for combination in combinations:
        for setup, settings in _attempts(plan.setup, combination):
            if _cannot_fit(setup):
                continue
            if (tried := make_plan(setup)).fits:
                return Suggestion(settings, tried)
    return None


Attempt = tuple[Setup, list[str]]
Change = Callable[[Setup], Iterator[Attempt]]
"""A function that yields the ways to change a setup, each with the settings that make this change."""


def _cannot_fit(setup: Setup) -> bool:
    """Tell whether a setup can't fit even without activations, which take long to measure."""
    return memory_without_activations(setup) > memory_limit(setup)


def _attempts(setup: Setup, kinds: Sequence[Change]) -> Iterator[Attempt]:
    """Yield all ways to apply the changes one after the other; a change that is already made is left out."""
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
    while max(limits) > 1 and not _cannot_fit(setup):
        largest = make_plan(setup).memory.stage
        if limits[largest] == 1:
            return
        changed = largest_even_micro_batch(setup, largest, limits[largest] // 2)
        limits = (*limits[:largest], changed, *limits[largest + 1 :])
        setup = replace(setup, max_micro_batch=limits)
        yield setup, ["--data.init_args.max_micro_batch", str(list(limits))]


def _smallest(setup: Setup) -> Iterator[Attempt]:
    limits = tuple(1 for _ in setup.max_micro_batch)
    yield replace(setup, max_micro_batch=limits), ["--data.init_args.max_micro_batch", str(list(limits))]


def _fsdp2(setup: Setup) -> Iterator[Attempt]:
    sharding = Sharding("fsdp2", param_dtype=_half(setup))
    if setup.sharding == sharding or setup.devices == 1:
        return
    yield replace(setup, sharding=sharding, precision="32-true"), _strategy_settings(sharding)


def _fsdp2_over_all(setup: Setup) -> Iterator[Attempt]:
    """Shard over all nodes, instead of inside each of them."""
    sharding = setup.sharding if setup.sharding.kind == "fsdp2" else Sharding("fsdp2", param_dtype=_half(setup))
    if sharding.replicate == 1 or setup.devices == 1:
        return
    sharding = replace(sharding, replicate=1)
    yield replace(setup, sharding=sharding, precision="32-true"), _strategy_settings(sharding)


def _half(setup: Setup) -> str:
    return setup.matmul_dtype if setup.matmul_dtype in ("bfloat16", "float16") else "float32"


def _strategy_settings(sharding: Sharding) -> list[str]:
    """Return the recipe keys of an FSDP2 strategy: naming its class drops what a recipe says about it."""
    strategy = "--trainer.strategy"
    settings = [strategy, "nami_lightning.FSDP2Strategy", f"{strategy}.param_dtype", sharding.param_dtype]
    for name in ("replicate", "reduce_dtype", "reshard_after_forward", "shard_text_encoder"):
        value = getattr(sharding, name)
        if value != getattr(Sharding(), name):
            settings += [f"{strategy}.{name}", str(value)]
    if not sharding.reduce_each_micro_batch:
        settings += [f"{strategy}.reduce_gradients", "step"]
    return [*settings, "--trainer.precision", "32-true"]


def _more_devices(setup: Setup) -> Iterator[Attempt]:
    while setup.devices * 2 <= MOST_DEVICES:
        setup = replace(setup, devices=setup.devices * 2)
        try:
            limits = tuple(largest_even_micro_batch(setup, k, limit) for k, limit in enumerate(setup.max_micro_batch))
        except ValueError:
            return
        settings = ["--devices", str(setup.devices)]
        if limits != setup.max_micro_batch:
            settings += ["--data.init_args.max_micro_batch", str(list(limits))]
        setup = replace(setup, max_micro_batch=limits)
        yield setup, settings
