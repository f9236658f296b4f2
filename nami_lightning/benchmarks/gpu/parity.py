"""The same numbers on the CPU and on the GPU: each check compares one way of computing with the CPU's float32.

The network is the demo's (``recipes/openmoji.yaml``), with random weights and bridges and the same random inputs. The
tests marked ``gpu`` run the same checks.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from nami_lightning.benchmarks.gpu.section import Promise, at_most
from nami_lightning.benchmarks.sampling import without_encoders
from nami_lightning.models import flow
from nami_lightning.pipelines.cuda_graphs import CudaGraphs
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.runs.recipe import Recipe
from nami_lightning.training.ema import make_ema_model, update_ema
from nami_lightning.training.module import NamiModule
from nami_lightning.training.strategies import FSDP2Strategy, full_tensor, parallelize

SAMPLES = 3
"""Images of each stage in a step."""

CPU = torch.device("cpu")


class Skipped(Exception):
    """A check can't be run here; it says why."""


def make_module(device: torch.device) -> NamiModule:
    """Return the demo's module with the same random weights and bridges on any device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Recipe("openmoji", []).make_model()
        module.configure_model()
        with torch.no_grad():
            for parameter in module.transformer.parameters():  # some are zero at the start of a training
                parameter.add_(0.02 * torch.randn(parameter.shape))
    module.bridge.fitted.fill_(True)
    return module.to(device)


def text_states(module: NamiModule, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return random text states on the CPU: a sequence and a pooled one."""
    generator = torch.Generator().manual_seed(seed)
    width, pooled_width = module.text_dims
    sequence = torch.randn(rows, module.text_encoder_config.max_length, width, generator=generator)
    return sequence, torch.randn(rows, pooled_width, generator=generator)


@dataclass(frozen=True)
class Step:
    """What a training step gave, on the CPU: the loss, each weight's gradient, and its change by the update."""

    loss: Tensor
    gradients: dict[str, Tensor]
    updates: dict[str, Tensor]


def training_step(module: NamiModule, dtype: torch.dtype | None = None) -> Step:
    """Take one step with AdamW on a micro-batch of each stage, whose random numbers are the CPU's.

    Args:
        module: with its network, on the device that computes.
        dtype: of autocast; None: float32.
    """
    device, network = module.device, module.transformer
    before = {name: full_tensor(p.detach()).cpu().clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    total = torch.zeros((), device=device)
    for stage, side in enumerate(module.resolutions):
        generator = torch.Generator().manual_seed(stage)
        clean, noise = (torch.randn(SAMPLES, 3, side, side, generator=generator).to(device) for _ in range(2))
        tau = torch.rand(SAMPLES, generator=generator).to(device)
        texts = [states.to(device) for states in text_states(module, SAMPLES, stage)]
        window = module.bridge.windows[stage]
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            start, end = module.bridge.endpoints(stage, clean, flow.pool(clean), noise)
            x, target = flow.interpolate(start, end, tau), flow.velocity_target(start, end, window)
            velocity = network(x, *texts, window.timestep(tau), stage).float()
        loss = F.mse_loss(velocity, target)
        loss.backward()
        total += loss.detach()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    gradients = {
        name: full_tensor(p.grad).cpu().clone() for name, p in network.named_parameters() if p.grad is not None
    }
    optimizer.step()
    updates = {name: full_tensor(p.detach()).cpu() - before[name] for name, p in network.named_parameters()}
    return Step(total.cpu(), gradients, updates)


def distance(values: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Return the norm of the difference of all tensors over the norm of the reference."""
    if values.keys() != reference.keys():
        return float("inf")
    difference = sum(float((values[name].double() - reference[name].double()).square().sum()) for name in reference)
    return float((difference / sum(float(one.double().square().sum()) for one in reference.values())) ** 0.5)


def compare_steps(name: str, step: Step, reference: Step, loss: float, gradient: float, update: float) -> list[Promise]:
    """Return the promises that a step's loss, gradients and update differ from a reference by at most so much."""
    return [
        at_most(f"{name}: loss", float((step.loss - reference.loss).abs() / reference.loss), loss),
        at_most(f"{name}: gradients", distance(step.gradients, reference.gradients), gradient),
        at_most(f"{name}: update", distance(step.updates, reference.updates), update),
    ]


# AdamW's first update is nearly the gradient's sign: where a gradient is almost zero, rounding turns it round. So the
# update's limit is wide.


def training_in_float32(device: torch.device) -> list[Promise]:
    """Compare a training step in float32."""
    step, reference = (training_step(make_module(where)) for where in (device, CPU))
    return compare_steps("training step, float32", step, reference, loss=1e-5, gradient=1e-4, update=5e-2)


def training_in_bfloat16(device: torch.device) -> list[Promise]:
    """Compare a training step under autocast to bfloat16."""
    reference = training_step(make_module(CPU))
    step = training_step(make_module(device), torch.bfloat16)
    return compare_steps("training step, bf16-mixed", step, reference, loss=1e-2, gradient=5e-2, update=0.5)


def training_compiled(device: torch.device) -> list[Promise]:
    """Compare a training step with compiled blocks with the same device's eager one."""
    compiled = make_module(device)
    parallelize(compiled.transformer, None, compile=True)
    steps = training_step(compiled), training_step(make_module(device))
    return compare_steps("training step, compiled", *steps, loss=1e-5, gradient=1e-4, update=5e-2)


def training_in_float8(device: torch.device) -> list[Promise]:
    """Compare a training step with float8 matrix products."""
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        raise Skipped("this GPU has no float8")
    module = make_module(device)
    try:
        parallelize(module.transformer, None, float8=True)
    except ModuleNotFoundError as error:
        raise Skipped(str(error)) from error
    steps = training_step(module, torch.bfloat16), training_step(make_module(CPU))
    return compare_steps("training step, float8", *steps, loss=5e-2, gradient=0.3, update=1.0)


def training_with_shards(device: torch.device) -> list[Promise]:
    """Compare a training step under FSDP2 of one rank with one without."""
    module = make_module(device)
    with one_rank(device) as strategy:
        parallelize(module.transformer, strategy)
        step = training_step(module)
    backend = "NCCL" if device.type == "cuda" else "gloo"
    reference = training_step(make_module(device))
    return compare_steps(f"training step, FSDP2 over {backend}", step, reference, 1e-6, 1e-5, 5e-2)


@contextmanager
def one_rank(device: torch.device) -> Iterator[FSDP2Strategy]:
    """Run a ``with`` block in a process group of this process alone; yield a strategy that shards over it."""
    if dist.is_initialized():
        raise Skipped("a process group is there already")
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        try:
            strategy = FSDP2Strategy(replicate=1)
            strategy._device_mesh = init_device_mesh(device.type, (1, 1), mesh_dim_names=("replicate", "shard"))
            yield strategy
        finally:
            dist.destroy_process_group()


def ema_on_the_host(device: torch.device) -> list[Promise]:
    """Compare an EMA in the host's memory with one on the device."""
    module = make_module(device)
    averages = [make_ema_model(module.transformer, module.make_transformer, None, on_host) for on_host in (True, False)]
    for _ in range(3):
        training_step(module)
        for average in averages:
            update_ema(average, module.transformer, 0.9)
    if any(parameter.device.type != "cpu" for parameter in averages[0].parameters()):
        raise RuntimeError("the EMA on the host has weights on the device")
    on_host, on_device = ({name: p.cpu() for name, p in average.named_parameters()} for average in averages)
    return [at_most("EMA on the host", distance(on_host, on_device), 1e-6)]


def draw(pipeline: NamiPipeline, module: NamiModule) -> dict[str, Tensor]:
    """Draw with guidance, from noise and text states that are the CPU's; return latents on the CPU."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(SAMPLES, 3, side, side, generator=generator) for side in module.resolutions]
    (sequence, pooled), (negative, negative_pooled) = text_states(module, SAMPLES, 0), text_states(module, 1, 1)
    latents = pipeline(
        prompt_embeds=sequence,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=negative,
        negative_pooled_prompt_embeds=negative_pooled,
        latents=noise,
        num_inference_steps=[3] * len(noise),
        guidance_scale=2.0,
        output_type="latent",
    ).images
    return {"latents": latents.float().cpu()}


def drawing(device: torch.device) -> list[Promise]:
    """Compare a drawing in float32 and in bfloat16, and one that CUDA graphs replay."""
    module = make_module(CPU)
    reference = draw(without_encoders(module, module.transformer, module.bridge), module)
    on_device = make_module(device)
    pipeline = without_encoders(on_device, on_device.transformer, on_device.bridge)
    eager = draw(pipeline, module)
    promises = [at_most("drawing, float32", distance(eager, reference), 1e-4)]
    if device.type == "cuda":
        graphs = CudaGraphs(pipeline.transformer)
        for _ in range(2):  # captured, then replayed
            replayed = draw(pipeline, module)
        graphs.remove()
        promises.append(at_most("drawing, CUDA graphs beside eager", distance(replayed, eager), 1e-5))
    else:
        promises.append(Promise("drawing, CUDA graphs beside eager", "not run: no GPU", "at most 1e-05", None))
    nn.Module.to(pipeline.transformer, torch.bfloat16)
    return [*promises, at_most("drawing, bfloat16", distance(draw(pipeline, module), reference), 5e-2)]


CHECKS: tuple[Callable[[torch.device], list[Promise]], ...] = (
    training_in_float32,
    training_in_bfloat16,
    training_compiled,
    training_in_float8,
    training_with_shards,
    ema_on_the_host,
    drawing,
)
"""Each returns what it promises of a device, or raises :class:`Skipped`."""
