"""``lightning plan``: what a recipe needs on given devices, printed on the terminal or as JSON."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nami_lightning.cli.argument_types import positive_float, positive_int

if TYPE_CHECKING:
    from nami_lightning.datamodules import MultiResolutionDataModule
    from nami_lightning.datamodules.precomputed.records import Layout
    from nami_lightning.planning.inputs import Network, Setup, Sharding
    from nami_lightning.planning.report import TrainingImages
    from nami_lightning.training.module import NamiModule

EXAMPLES = """\
examples:
  lightning plan nami_2b --devices 64 --device a100-80gb
  lightning plan nami_0.6b --devices 8 --device h100 --images 50000000
  lightning plan nami_2b --devices 64 --device a100-40gb --model.activation_checkpointing 2   any recipe key
  lightning plan nami_2b --devices 64 --network_bandwidth 12.5   slower cards between the nodes
  lightning plan nami_2b --devices 64 --json               all figures as JSON
"""

DEFAULT_DEVICES_PER_NODE = 8


def add_command(commands: Any) -> None:
    """Add ``plan`` to the command line."""
    parser = commands.add_parser(
        "plan",
        help="print what a recipe needs: memory, operations, GPU-hours",
        description="Print what RECIPE needs on given devices, next to FLUX-base, which is the same network with one "
        "stage. Nothing is downloaded, prepared or trained.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a recipe file, or the name of a packaged recipe; any recipe key may follow"
    )
    parser.add_argument(
        "--devices",
        type=positive_int,
        help="number of devices (default: the recipe's trainer.devices, or 8 if that is auto)",
    )
    parser.add_argument(
        "--device", default="a100-80gb", help="kind of device: a100-40gb, h100, h200, ... (default a100-80gb)"
    )
    parser.add_argument(
        "--devices_per_node",
        type=positive_int,
        help=f"number of devices of a node (default: {DEFAULT_DEVICES_PER_NODE}, or what a recipe of several nodes "
        "states)",
    )
    for place in ("node", "network"):
        where = "the others of its node" if place == "node" else "other nodes"
        parser.add_argument(
            f"--{place}_bandwidth",
            type=positive_float,
            metavar="GB/S",
            help=f"GB/s that a device can send to {where} (default: by the kind of device)",
        )
    parser.add_argument(
        "--utilization",
        type=float,
        default=0.4,
        help="assumed share of the devices' peak speed, from 0 to 1 (default 0.4)",
    )
    parser.add_argument(
        "--images",
        type=positive_int,
        nargs="+",
        metavar="N",
        help="number of training images: one total, or one number for each resolution",
    )
    parser.add_argument(
        "--stored_encodings",
        action="store_true",
        help="plan a training on encodings (lightning data encode), whatever data set is there now",
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON: bytes, operations, seconds")
    parser.set_defaults(execute=plan, takes_keys=True)


def plan(options: Namespace) -> None:
    """Print what a recipe needs, next to what FLUX-base needs."""
    from nami_lightning.planning.plan import make_plan
    from nami_lightning.planning.report import as_json, as_text
    from nami_lightning.planning.suggestions import find_suggestion
    from nami_lightning.runs.recipe import Recipe

    if not 0 < options.utilization <= 1:
        raise ValueError(f"--utilization must be above 0 and at most 1; got {options.utilization}")
    recipe = Recipe(options.recipe, options.overrides)
    objects = recipe.parser.instantiate(recipe.config)
    setup = read_setup(recipe.config.name, objects, options)
    ours = make_plan(setup)
    suggestion = None if ours.fits else find_suggestion(ours)
    base = make_plan(setup.flux_base()) if setup.curriculum.num_stages > 1 else None
    data = count_images(objects.data, options.images)
    if options.json:
        print(json.dumps(as_json(ours, base, suggestion, data), indent=2))
    else:
        print("\n".join(as_text(ours, base, suggestion, data)))


def read_setup(name: str, objects: Any, options: Namespace) -> Setup:
    """Return the settings of a recipe's objects that a plan depends on.

    Raises:
        ValueError: the device, the strategy or the kind of DataModule is one that plans don't know.
    """
    import torch

    from nami_lightning.callbacks import EMA
    from nami_lightning.datamodules import MultiResolutionDataModule
    from nami_lightning.planning.flops import DEVICES
    from nami_lightning.planning.inputs import Network, Setup
    from nami_lightning.training.checks import check_precision
    from nami_lightning.training.module import NamiModule

    module, data, trainer = objects.model, objects.data, objects.trainer
    assert isinstance(module, NamiModule)
    if not isinstance(data, MultiResolutionDataModule):
        raise ValueError(f"a plan needs a MultiResolutionDataModule as data; the recipe has {type(data).__name__}")
    if options.device not in DEVICES:
        raise ValueError(f"--device must be one of {', '.join(DEVICES)}; got {options.device}")
    with torch.device("meta"):
        kind = type(module.make_transformer())
    layout = planned_encodings(module, data, options.stored_encodings)
    devices = options.devices or count_devices(trainer)
    network = Network.from_config(kind, module.transformer_config, module.lora)
    setup = Setup(
        name=name,
        network=network,
        resolutions=tuple(module.resolutions),
        factor=module.autoencoder_config.factor,
        text_tokens=module.text_encoder_config.max_length,
        curriculum=module.curriculum,
        max_micro_batch=tuple(data.max_micro_batch),
        devices=devices,
        device=options.device,
        utilization=options.utilization,
        activation_checkpointing=module.activation_checkpointing,
        precision=check_precision(trainer.precision),
        sharding=read_sharding(trainer.strategy),
        ema=any(isinstance(callback, EMA) for callback in trainer.callbacks or []),
        optimizer=optimizer_state(module, network),
        devices_per_node=options.devices_per_node or count_devices_per_node(trainer, options.devices),
        node_bandwidth=options.node_bandwidth,
        network_bandwidth=options.network_bandwidth,
        read_ahead=bytes_read_ahead(data, devices, layout),
        techniques=module.techniques,
        teacher_calls=0 if module.distillation is None else module.distillation.teacher_calls,
    )
    return setup if layout else add_encoders(setup, module)


def count_devices(trainer: Any) -> int:
    """Return the number of devices that the recipe states; eight on each node if it states none.

    Raises:
        ValueError: a number below 1.
    """
    number = count_listed(trainer)
    nodes = 1 if trainer.num_nodes is None else int(trainer.num_nodes)
    if number < 1 or nodes < 1:
        raise ValueError(
            f"trainer.devices and trainer.num_nodes must be at least 1; got {trainer.devices} and {trainer.num_nodes}"
        )
    return number * nodes


def count_listed(trainer: Any) -> int:
    """Return the number of a node's devices that the recipe states; eight if it states none."""
    each = trainer.devices
    if isinstance(each, str) and "," in each:  # Lightning's way to list devices: "0,1"
        each = each.strip(",").split(",")
    return len(each) if isinstance(each, list) else int(each) if str(each).isdigit() else DEFAULT_DEVICES_PER_NODE


def count_devices_per_node(trainer: Any, all_devices: int | None) -> int:
    """Return the number of devices of a node: the recipe's, if that states several nodes and ``all_devices`` is None.

    One node may have room for more devices than the recipe uses: eight, if there are no more.
    """
    several_nodes = trainer.num_nodes is not None and int(trainer.num_nodes) > 1
    listed = count_listed(trainer)
    return listed if several_nodes and all_devices is None else max(listed, DEFAULT_DEVICES_PER_NODE)


def planned_encodings(module: NamiModule, data: MultiResolutionDataModule, stored: bool) -> Layout | None:
    """Return the layout of the encodings that are trained on; None: of images, which each step encodes.

    They are those of the data set, or if ``stored`` those that the recipe's encoders would make.
    """
    from nami_lightning.datamodules.precomputed.records import Layout
    from nami_lightning.models.autoencoder import PIXELS

    if found := (read_description(data) or {}).get("encodings"):
        return Layout(**found["layout"])
    if not stored:
        return None
    config, width, pooled_width = module.autoencoder_config, *module.text_dims
    return Layout(
        list(data.resolutions),
        module.latent_pyramid,
        config.name == PIXELS,
        config.factor,
        module.transformer_config["in_channels"],
        module.text_encoder_config.max_length,
        width,
        pooled_width,
    )


def bytes_read_ahead(data: MultiResolutionDataModule, ranks: int, encodings: Layout | None) -> int:
    """Return the bytes that the workers of one rank hold ready, for training and for a validation.

    The data set need not be prepared.
    """
    from nami_lightning.datamodules.stage_images import StageImages

    images = StageImages([], data.resolutions, data.latent_pyramid == "pool")
    sample_bytes = (encodings or images).sample_bytes
    return data.read_ahead(ranks, sample_bytes).total + data.read_ahead_in_validation(ranks, sample_bytes).total


def read_sharding(strategy: Any) -> Sharding:
    """Return how a strategy of the recipe stores the weights on the devices.

    Raises:
        ValueError: the strategy is neither DDP nor FSDP2.
    """
    import torch
    from lightning.pytorch.strategies import DDPStrategy

    from nami_lightning.planning.inputs import Sharding
    from nami_lightning.training.strategies import FSDP2Strategy

    if strategy == "fsdp2":
        strategy = FSDP2Strategy()
    if isinstance(strategy, FSDP2Strategy):
        names = {dtype: name for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))}
        names[torch.float16] = "float16"
        policy = strategy.policy
        assert policy.param_dtype is not None
        assert policy.reduce_dtype is not None
        return Sharding(
            "fsdp2",
            strategy.replicate,
            names[policy.param_dtype],
            names[policy.reduce_dtype],
            strategy.reshard_after_forward,
            strategy.reduce_each_micro_batch,
            shard_text_encoder=strategy.shard_text_encoder,
        )
    if isinstance(strategy, DDPStrategy):
        return Sharding(gradient_as_bucket_view=bool(strategy._ddp_kwargs.get("gradient_as_bucket_view")))
    if strategy is None or str(strategy).startswith(("auto", "ddp")):
        return Sharding(auto=not str(strategy).startswith("ddp"))
    raise ValueError(f"lightning plan knows only trainer.strategy ddp and fsdp2; the recipe has {strategy}")


def optimizer_state(module: NamiModule, network: Network) -> float:
    """Return the bytes of the optimizer's state for each byte of trained weights.

    It is found by one step on small tensors that have the same names as the weights.
    """
    import torch

    real = network.trained
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


def add_encoders(setup: Setup, module: NamiModule) -> Setup:
    """Return the setup with the frozen encoders that its training loads."""
    from nami_lightning.planning import encoder_memory

    finest = module.resolutions[-1]
    encodes = [[side, side // 2] if stage else [side] for stage, side in enumerate(module.resolutions)]
    if module.latent_pyramid == "pool":
        encodes = [[finest] for _ in module.resolutions]
    micro_batches = [setup.micro_batch(stage) for stage in range(len(encodes))]
    models = encoder_memory.text_encoders(module.text_encoder_config, len(encodes))
    if setup.sharding.shard_text_encoder:
        models = [replace(model, memory=model.memory and -(-model.memory // setup.shards)) for model in models]
    models += encoder_memory.autoencoder(module.autoencoder_config, encodes, micro_batches)
    return replace(setup, frozen=tuple(models))


def read_description(data: MultiResolutionDataModule) -> dict[str, Any] | None:
    """Return the description that the recipe's data set was prepared with; None if it is not prepared."""
    from nami_lightning.datamodules.storage.dataset import PreparedDataset

    try:
        return PreparedDataset(data.dataset_folder).description
    except FileNotFoundError:
        return None


def count_images(data: MultiResolutionDataModule, images: Sequence[int] | None) -> TrainingImages | None:
    """Return the number of images by resolution, as given or as counted in the prepared data set.

    Raises:
        ValueError: the option gives neither one number nor one for each stage.
    """
    from nami_lightning.datamodules.storage.dataset import parse_bucket_name
    from nami_lightning.planning.report import TrainingImages

    if images:
        if len(images) not in (1, len(data.resolutions)):
            raise ValueError(
                f"--images takes one number, or one for each resolution of {data.resolutions}; got {list(images)}"
            )
        sides = data.resolutions[-len(images) :]
        return TrainingImages("--images", dict(zip(sides, images, strict=True)))
    if (found := read_description(data)) is None:
        return None
    counts: dict[int, int] = {}
    for name, samples in found["samples"]["train"].items():
        side, _ = parse_bucket_name(name)
        counts[side] = counts.get(side, 0) + samples
    return TrainingImages(str(data.dataset_folder), dict(sorted(counts.items())))
