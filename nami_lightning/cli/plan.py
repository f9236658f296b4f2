"""``lightning plan``: what a recipe needs on given devices, on the terminal or as JSON."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nami_lightning.datamodules import MultiResolutionDataModule
    from nami_lightning.planning.inputs import Network, Setup, Spread
    from nami_lightning.planning.report import Data
    from nami_lightning.training.module import NamiModule

EXAMPLES = """\
examples:
  lightning plan nami_2b --devices 64 --device a100-80gb
  lightning plan nami_0.6b --devices 8 --device h100 --images 50000000
  lightning plan nami_2b --devices 64 --device a100-40gb --model.activation_checkpointing 2   any recipe key
  lightning plan nami_2b --devices 64 --json               the same for programs
"""

DEVICES_IF_UNSAID = 8
ALIASES = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
"""Lightning's own short names of precisions."""


def add_command(commands: Any) -> None:
    """Add ``plan`` to the command line."""
    parser = commands.add_parser(
        "plan",
        help="what a recipe needs: memory, operations, GPU-hours",
        description="Say before anything is bought what RECIPE needs on given devices, beside FLUX-base, the same "
        "network with one stage. Nothing is downloaded, prepared or trained.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a packaged one; keys may follow")
    parser.add_argument("--devices", type=int, help="how many (default: the recipe's trainer.devices; 8 if it is auto)")
    parser.add_argument("--device", default="a100-80gb", help="which: a100-40gb, h100, h200, ... (default a100-80gb)")
    parser.add_argument(
        "--utilization", type=float, default=0.4, help="share of the device's peak that is reached (default 0.4)"
    )
    parser.add_argument(
        "--images", type=int, nargs="+", metavar="N", help="images for training: all, or those of each resolution"
    )
    parser.add_argument("--json", action="store_true", help="all figures for programs: bytes, operations, seconds")
    parser.set_defaults(execute=plan, takes_keys=True)


def plan(options: Namespace) -> None:
    """Print what a recipe needs, beside FLUX-base."""
    from nami_lightning.planning.plan import make_plan
    from nami_lightning.planning.report import as_json, as_text
    from nami_lightning.planning.suggestions import find_remedy
    from nami_lightning.runs.recipe import Recipe

    if not 0 < options.utilization <= 1:
        raise ValueError(f"--utilization must lie above 0 and not above 1; got {options.utilization}")
    recipe = Recipe(options.recipe, options.overrides)
    objects = recipe.parser.instantiate(recipe.config)
    setup = read_setup(recipe.config.name, objects, options)
    ours = make_plan(setup)
    remedy = None if ours.fits else find_remedy(ours)
    base = make_plan(setup.flux_base()) if setup.curriculum.num_stages > 1 else None
    data = read_data(objects.data, options.images)
    if options.json:
        print(json.dumps(as_json(ours, base, remedy, data), indent=2))
    else:
        print("\n".join(as_text(ours, base, remedy, data)))


def read_setup(name: str, objects: Any, options: Namespace) -> Setup:
    """The settings of a recipe's objects that a plan depends on.

    Raises:
        ValueError: a device or strategy that plans don't know, or a DataModule of another kind.
    """
    import torch

    from nami_lightning.callbacks import EMA
    from nami_lightning.datamodules import MultiResolutionDataModule
    from nami_lightning.planning.flops import DEVICES
    from nami_lightning.planning.inputs import Network, Setup
    from nami_lightning.training.module import NamiModule

    module, data, trainer = objects.model, objects.data, objects.trainer
    assert isinstance(module, NamiModule)
    if not isinstance(data, MultiResolutionDataModule):
        raise ValueError(f"a plan needs a MultiResolutionDataModule as data; the recipe has {type(data).__name__}")
    if options.device not in DEVICES:
        raise ValueError(f"--device must be one of {', '.join(DEVICES)}; got {options.device}")
    precision = str(trainer.precision or "32-true")
    with torch.device("meta"):
        kind = type(module.make_transformer())
    network = Network.of(kind, module.transformer_config)
    setup = Setup(
        name=name,
        network=network,
        resolutions=tuple(module.resolutions),
        factor=module.autoencoder_config.factor,
        text_tokens=module.text_encoder_config.max_length,
        curriculum=module.curriculum,
        max_micro_batch=tuple(data.max_micro_batch),
        devices=options.devices or devices_of(trainer),
        device=options.device,
        utilization=options.utilization,
        activation_checkpointing=module.activation_checkpointing,
        precision=ALIASES.get(precision, precision),
        spread=spread_of(trainer.strategy),
        ema=any(isinstance(callback, EMA) for callback in trainer.callbacks or []),
        optimizer=optimizer_state(module, network),
    )
    return with_frozen(setup, module, data)


def devices_of(trainer: Any) -> int:
    """Of the recipe, where it says a number; else eight on each node."""
    each = trainer.devices
    number = len(each) if isinstance(each, list) else int(each) if str(each).isdigit() else DEVICES_IF_UNSAID
    return number * int(trainer.num_nodes or 1)


def spread_of(strategy: Any) -> Spread:
    """How a strategy of the recipe spreads weights.

    Raises:
        ValueError: it is neither DDP nor FSDP2.
    """
    import torch
    from lightning.pytorch.strategies import DDPStrategy

    from nami_lightning.planning.inputs import Spread
    from nami_lightning.training.strategies import FSDP2Strategy

    if strategy == "fsdp2":
        strategy = FSDP2Strategy()
    if isinstance(strategy, FSDP2Strategy):
        names = {dtype: name for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))}
        names[torch.float16] = "float16"
        policy = strategy.policy
        assert policy.param_dtype is not None
        assert policy.reduce_dtype is not None
        return Spread(
            "fsdp2",
            strategy.replicate,
            names[policy.param_dtype],
            names[policy.reduce_dtype],
            strategy.reshard_after_forward,
            strategy.reduce_each_micro_batch,
            shard_text_encoder=strategy.shard_text_encoder,
        )
    if isinstance(strategy, DDPStrategy):
        return Spread(gradient_as_bucket_view=bool(strategy._ddp_kwargs.get("gradient_as_bucket_view")))
    if strategy is None or str(strategy).startswith(("auto", "ddp")):
        return Spread()
    raise ValueError(f"a plan knows trainer.strategy ddp and fsdp2; the recipe has {strategy}")


def optimizer_state(module: NamiModule, network: Network) -> float:
    """Bytes of the optimizer's state for each byte of weights, found by one step on small ones with the same names."""
    import torch

    real = dict(network.model.named_parameters())
    small = {name: torch.nn.Parameter(torch.zeros([2] * weight.ndim)) for name, weight in real.items()}
    optimizer = module.make_optimizer(small.items())
    for weight in small.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = 0.0
    for name, weight in small.items():
        state = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor) and value.dim()]
        held += sum(value.nbytes for value in state) / weight.nbytes * real[name].numel()
    return held / sum(weight.numel() for weight in real.values())


def with_frozen(setup: Setup, module: NamiModule, data: MultiResolutionDataModule) -> Setup:
    """The setup with the encoders that its training loads."""
    from nami_lightning.planning import encoder_memory

    if (about := description(data)) is not None and about.get("encodings"):
        return setup
    finest = module.resolutions[-1]
    encodes = [[side, side // 2] if stage else [side] for stage, side in enumerate(module.resolutions)]
    if module.latent_pyramid == "pool":
        encodes = [[finest] for _ in module.resolutions]
    micro_batches = [setup.micro_batch(stage) for stage in range(len(encodes))]
    models = encoder_memory.text_encoders(module.text_encoder_config, len(encodes))
    if setup.spread.shard_text_encoder:
        shards = setup.spread.shards(setup.devices)
        models = [replace(model, memory=model.memory and -(-model.memory // shards)) for model in models]
    models += encoder_memory.autoencoder(module.autoencoder_config, encodes, micro_batches)
    return replace(setup, frozen=tuple(models))


def description(data: MultiResolutionDataModule) -> dict[str, Any] | None:
    """What the recipe's data set says of itself, if it is prepared."""
    from nami_lightning.datamodules.storage.dataset import PreparedDataset

    try:
        return PreparedDataset(data.dataset_folder).description
    except FileNotFoundError:
        return None


def read_data(data: MultiResolutionDataModule, images: Sequence[int] | None) -> Data | None:
    """Images by resolution: as given, or as counted in the prepared data set.

    Raises:
        ValueError: as many numbers as neither one nor the stages.
    """
    from nami_lightning.datamodules.storage.dataset import parse_bucket_name
    from nami_lightning.planning.report import Data

    if images:
        if len(images) not in (1, len(data.resolutions)):
            raise ValueError(f"--images takes one number, or one for each of {data.resolutions}; got {list(images)}")
        sides = data.resolutions[-len(images) :]
        return Data("--images", dict(zip(sides, images, strict=True)))
    if (about := description(data)) is None:
        return None
    counts: dict[int, int] = {}
    for name, samples in about["samples"]["train"].items():
        side, _ = parse_bucket_name(name)
        counts[side] = counts.get(side, 0) + samples
    return Data(str(data.dataset_folder), dict(sorted(counts.items())))
