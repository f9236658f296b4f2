"""What ``lightning plan`` does: a recipe's settings to a plan, on the terminal or as JSON."""

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from nami_lightning.callbacks import EMA
from nami_lightning.datamodules import MultiResolutionDataModule
from nami_lightning.datamodules.dataset import PreparedDataset, parse_bucket_name
from nami_lightning.planning import encoder_memory as frozen
from nami_lightning.planning.flops import DEVICES
from nami_lightning.planning.inputs import Network, Setup, Spread
from nami_lightning.planning.plan import make_plan
from nami_lightning.planning.report import Data, as_json, as_text
from nami_lightning.planning.suggestions import find_remedy
from nami_lightning.runs.recipe import Recipe
from nami_lightning.training.module import NamiModule
from nami_lightning.training.strategies import FSDP2Strategy

DEVICES_IF_UNSAID = 8
ALIASES = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
"""Lightning's own short names of precisions."""


def plan(options: Namespace) -> None:
    """Print what a recipe needs, beside FLUX-base."""
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
    if (about := description(data)) is not None and about.get("encodings"):
        return setup
    finest = module.resolutions[-1]
    encodes = [[side, side // 2] if stage else [side] for stage, side in enumerate(module.resolutions)]
    if module.latent_pyramid == "pool":
        encodes = [[finest] for _ in module.resolutions]
    micro_batches = [setup.micro_batch(stage) for stage in range(len(encodes))]
    models = frozen.text_encoders(module.text_encoder_config, len(encodes))
    if setup.spread.shard_text_encoder:
        shards = setup.spread.shards(setup.devices)
        models = [replace(model, memory=model.memory and -(-model.memory // shards)) for model in models]
    models += frozen.autoencoder(module.autoencoder_config, encodes, micro_batches)
    return replace(setup, frozen=tuple(models))


def description(data: MultiResolutionDataModule) -> dict[str, Any] | None:
    """What the recipe's data set says of itself, if it is prepared."""
    try:
        return PreparedDataset(data.dataset_folder).description
    except FileNotFoundError:
        return None


def read_data(data: MultiResolutionDataModule, images: Sequence[int] | None) -> Data | None:
    """Images by resolution: as given, or as counted in the prepared data set.

    Raises:
        ValueError: as many numbers as neither one nor the stages.
    """
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
