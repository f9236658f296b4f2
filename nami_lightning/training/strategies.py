"""How a model is sharded over devices and fitted into their memory; nothing here knows of flows or images.

:func:`parallelize` does it in the one order that works:

1. float8: the blocks' linear layers multiply in it, with torchao's scales; weights stay as they are;
2. activation checkpointing wraps each (n-th) block: the backward pass recomputes it;
3. ``torch.compile`` compiles each block, its recomputation included: one graph a kind of block and shape of a
   micro-batch. It is for training alone: drawing and validation run the blocks as they are written, because their
   batches have many shapes (see ``SwapWeights`` in ``ema.py``), and so does an EMA's network;
4. FSDP2 (``fully_shard``) shards every block, every stage's head, then the rest at the root, over the mesh's ``shard``
   dimension, and replicates over its ``replicate`` dimension (HSDP) if that is larger than one, as it is by default on
   several nodes;
5. its mixed precision computes in ``param_dtype`` and reduces gradients in ``reduce_dtype``; the weights that the
   optimizer steps, and its moments, stay as they are (float32).

What FSDP2 sends for P parameters over N shards, each rank, a step: an all-gather of (N-1)/N * P in ``param_dtype`` for
every micro-batch's forward pass, again for its backward pass where parameters are resharded between, and one
reduce-scatter of (N-1)/N * P in ``reduce_dtype`` a step, or a micro-batch (``reduce_gradients``). HSDP adds an
all-reduce of P/N over the replicas. A micro-batch of stage k gathers only the blocks that run at stage k.
"""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from nami_lightning.models.lora import in_adapter, trained_parameters
from nami_lightning.models.text_encoder import PromptEncoder
from nami_lightning.models.transformer import NamiTransformer2DModel, is_hidden_layer
from nami_lightning.utils.shard_index import check_shards

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # float16 would need a scaled loss
DTypeName = Literal["float32", "bfloat16"]

MOST_GRAPHS = 256
"""Graphs that torch may compile of one kind of block: stages times aspect ratios are needed."""


class FSDP2Strategy(ModelParallelStrategy):
    """Shards over all processes with FSDP2, or HSDP; on a CPU with gloo too. In a recipe: ``trainer.strategy: fsdp2``.

    Args:
        replicate: groups of processes that hold a copy each; 1 shards over all. null: one a node, which keeps gathers
            inside it: between nodes only the shards' gradients are reduced.
        param_dtype: of the computation and the gathers.
        reduce_dtype: of the gradients' reduction.
        reshard_after_forward: drop a block's gathered weights between forward and backward: less memory, one more
            gather.
        reduce_gradients: after each ``micro_batch``, or once a ``step``, which keeps unsharded gradients until its last
            micro-batch: memory for P values, for fewer bytes.
        shard_text_encoder: shard the frozen text encoders too. All ranks must then encode at the same time, so that
            ``text_encoder.cache`` can't be on.
        timeout_minutes: of a collective; then the process ends with a message.

    Raises:
        ValueError: ``replicate`` does not divide the number of processes, or gradients of another dtype than
            the reduction's are to be kept: FSDP2 can't mix those that it kept with those of a stage's new blocks.
    """

    def __init__(
        self,
        replicate: int | None = None,
        param_dtype: DTypeName = "float32",
        reduce_dtype: DTypeName = "float32",
        reshard_after_forward: bool = True,
        reduce_gradients: Literal["step", "micro_batch"] = "micro_batch",
        shard_text_encoder: bool = False,
        timeout_minutes: float = 30,
    ) -> None:
        super().__init__(timeout=timedelta(minutes=timeout_minutes))
        if reduce_gradients == "step" and param_dtype != reduce_dtype:
            raise ValueError(
                f"reduce_gradients: step needs one dtype, but param_dtype is {param_dtype} and reduce_dtype "
                f"{reduce_dtype}: make them equal, or reduce after each micro_batch"
            )
        self.replicate = replicate
        self.policy = MixedPrecisionPolicy(
            param_dtype=DTYPES[param_dtype], reduce_dtype=DTYPES[reduce_dtype], cast_forward_inputs=False
        )
        self.reshard_after_forward, self.shard_text_encoder = reshard_after_forward, shard_text_encoder
        self.reduce_each_micro_batch = reduce_gradients == "micro_batch"

    def setup_environment(self) -> None:
        """Start the process group and make the mesh."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
        self.replicate = self.num_nodes if self.replicate is None else self.replicate
        if self.replicate < 1 or self.world_size % self.replicate:
            raise ValueError(f"replicate {self.replicate} must divide the {self.world_size} processes")
        # For checkpoints alone, on the host: a thread may write one while a step's own collectives go on.
        self._checkpoint_group = torch.distributed.new_group(backend="gloo", timeout=self._timeout)
        sizes = (self.replicate, self.world_size // self.replicate)
        self._device_mesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=("replicate", "shard"))
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The number of replicas and the rank: every process has its own share of the data."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return this rank's shards where they lie: whoever writes a checkpoint copies them to the host, once."""
        assert self.model is not None
        return get_model_state_dict(self.model)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's state where it lies, filled up for weights that had no gradient yet.

        A resume needs all of it.
        """
        plain = getattr(optimizer, "_optimizer", optimizer)
        fill_state(plain)
        assert self.model is not None
        return get_optimizer_state_dict(self.model, plain)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint's shards; an EMA that is new to the run starts from the weights that are loaded.

        Raises:
            ValueError: reading it would run code, or its index is damaged.
        """
        module: Any = self.lightning_module
        path = Path(self.broadcast(checkpoint_path))
        check_shards(path)
        metadata = torch.load(path / "meta.pt", weights_only=True)
        if getattr(module, "ema", None) is None or metadata["nami"]["ema"]:
            return super().load_checkpoint(path, weights_only)
        ema, module.ema = module.ema, None
        try:
            metadata = super().load_checkpoint(path, weights_only)
        finally:
            module.ema = ema
        for average, weight in zip(local_shards(ema), local_shards(module.transformer), strict=True):
            average.copy_(weight)
        return metadata

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint folder, every rank its shards; ``filepath`` is the same on all ranks."""
        state = {"state_dict": checkpoint.pop("state_dict")}
        optimizers = checkpoint.pop("optimizer_states", [])
        state |= {f"optimizer_{index}": optimizer for index, optimizer in enumerate(optimizers)}
        dcp.save(state, checkpoint_id=filepath, process_group=self._checkpoint_group)
        if self.is_global_zero:
            torch.save(checkpoint, Path(filepath) / "meta.pt")

    @property
    def weights_mesh(self) -> DeviceMesh:
        """The devices over which weights are sharded: in two dimensions, if some of them are replicas."""
        mesh: DeviceMesh = self.device_mesh if (self.replicate or 1) > 1 else self.device_mesh["shard"]
        return mesh

    def shard_frozen(self, model: nn.Module) -> None:
        """Shard a model that is only run, in place: the layers of its longest list, then the rest at the root."""
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        for layer in max(lists, key=len, default=()):
            fully_shard(layer, mesh=self.weights_mesh)
        fully_shard(model, mesh=self.weights_mesh, reshard_after_forward=True)

    def shard(self, model: NamiTransformer2DModel) -> None:
        """Shard a network's blocks, heads and root, in place."""
        settings: dict[str, Any] = {"mesh": self.weights_mesh, "mp_policy": self.policy}
        for part in model.parts:
            fully_shard(part, reshard_after_forward=self.reshard_after_forward, **settings)
        # The root too: it is gathered again in every forward pass, but sampling between steps then needs no care.
        fully_shard(model, reshard_after_forward=True, **settings)


StrategyRegistry.register("fsdp2", FSDP2Strategy, "FSDP2 over all processes")


def parallelize(
    model: NamiTransformer2DModel,
    strategy: object,
    activation_checkpointing: int = 0,
    compile: bool = False,
    float8: bool = False,
) -> None:
    """Prepare a network for training under a strategy, in place; see the top of this file for the order.

    Args:
        model: on the CPU, with its weights.
        strategy: Lightning's; sharding is an :class:`FSDP2Strategy`'s, any other leaves the network whole.
        activation_checkpointing: recompute every so many-th block; 1 is every block, 0 none.
        compile: compile each block.
        float8: multiply in float8 in the blocks' linear layers.
    """
    leave_out_cudnn_attention()
    if float8:
        to_float8(model)
    if activation_checkpointing:
        model.enable_gradient_checkpointing(every=activation_checkpointing)
    if compile:
        _expect_a_graph_of_every_shape()
        for block in model.blocks(model.num_stages - 1):
            block.compile(dynamic=False)
    if isinstance(strategy, FSDP2Strategy):
        strategy.shard(model)


def leave_out_cudnn_attention() -> None:
    """Let attention use flash or memory-efficient kernels in this process, never cuDNN's, in drawing too.

    cuDNN's backward pass in bfloat16 gives NaN, or reads outside its memory, at some numbers of tokens (torch 2.11 on
    an H200, docs/scale.md; https://github.com/pytorch/pytorch/issues/196678), and torch takes it first on such GPUs.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def shard_parts(parts: Iterable[nn.Module], strategy: object) -> None:
    """Shard the parts that are trained beside a network, in place, if the strategy shards."""
    for part in parts:
        if isinstance(strategy, FSDP2Strategy) and any(True for _ in part.parameters()):
            fully_shard(part, mesh=strategy.weights_mesh, mp_policy=strategy.policy)


def _expect_a_graph_of_every_shape() -> None:
    """Let torch compile a block for each shape, and as a whole; by default it gives up after eight, for good.

    It would also cut a block's graph where DDP's buckets end. Blocks are small: their gradients are sent as soon as
    a block's backward pass is done.
    """
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = MOST_GRAPHS
    torch._dynamo.config.optimize_ddp = False


def to_float8(model: NamiTransformer2DModel) -> None:
    """Let the blocks' linear layers multiply in float8, in place (torchao; one scale a tensor, new in each step).

    Weights keep their names and dtype. Where the device has no float8 (CPUs, GPUs before Ada) it is emulated:
    slow, with the same rounding.

    Raises:
        ModuleNotFoundError: torchao is not installed.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"model.float8 needs torchao: pip install '.[float8]' ({error})") from error

    def fits(layer: nn.Module, name: str) -> bool:
        """Tell whether a layer lies between hidden features and has sizes that the hardware's kernels take."""
        multiple = isinstance(layer, nn.Linear) and layer.in_features % 16 == layer.out_features % 16 == 0
        return multiple and is_hidden_layer(name) and not in_adapter(name)

    emulate = not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9))
    # A layer's gradient multiplies over the rows, its tokens: kernels take multiples of 16, aspect buckets have others.
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    convert_to_float8_training(model, module_filter_fn=fits, config=config)


def shard_text_encoder(encoder: PromptEncoder, strategy: object) -> None:
    """Shard the models of a text encoder that is still on the CPU, if the strategy says so.

    Raises:
        ValueError: it caches encodings, so that ranks would run it at different times.
    """
    if not (isinstance(strategy, FSDP2Strategy) and strategy.shard_text_encoder):
        return
    if encoder.cache is not None:
        raise ValueError("shard_text_encoder needs model.text_encoder.cache: false; ranks cache different prompts")
    for model in filter(None, (encoder.sequence, encoder.pooled)):
        strategy.shard_frozen(model)


def fill_state(optimizer: Optimizer) -> None:
    """Give every parameter without an optimizer state the one that it would start with: zeros."""
    for group in optimizer.param_groups:
        stepped = [parameter for parameter in group["params"] if optimizer.state.get(parameter)]
        if not stepped:
            continue
        example = stepped[0]
        for parameter in (p for p in group["params"] if p not in optimizer.state):
            optimizer.state[parameter] = {
                name: torch.zeros_like(parameter if value.shape == example.shape else value)
                for name, value in optimizer.state[example].items()
            }


def reduce_gradients(models: Sequence[nn.Module], strategy: object, last: bool) -> None:
    """Tell DDP or FSDP2 before a micro-batch's backward pass whether to reduce the gradients after it.

    DDP reduces what a step's micro-batches have added up, in the last one's backward pass: Lightning reads DDP's
    attribute before each backward pass. DDP notes the parameters that earlier micro-batches used, and reduces them too.

    Args:
        models: those that are trained.
        strategy: Lightning's.
        last: whether the micro-batch is the step's last.
    """
    if isinstance(wrapper := getattr(strategy, "model", None), DistributedDataParallel):
        wrapper.require_backward_grad_sync = last
    for model in models:
        if isinstance(strategy, FSDP2Strategy) and isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last or strategy.reduce_each_micro_batch)


@torch.no_grad()
def local_shards(model: nn.Module) -> list[torch.Tensor]:
    """Return the values on this rank of what is trained (:func:`trained_parameters`): under FSDP2 their shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # With reshard_after_forward: false, a forward pass without a backward leaves them whole.
            module.reshard()
    return [p.to_local() if isinstance(p, DTensor) else p.data for _, p in trained_parameters(model)]


def full_tensor(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the values of all ranks' shards."""
    return value.full_tensor() if isinstance(value, DTensor) else value
