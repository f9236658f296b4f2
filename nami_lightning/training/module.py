"""NamiModule: the nested network and the bridges, and one training step, for Lightning's Trainer."""

from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from nami_lightning.models import flow
from nami_lightning.models.autoencoder import AutoencoderConfig
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.encoder_revisions import describe_encoders
from nami_lightning.models.flow import LossWeighting, TauKind
from nami_lightning.models.lora import LoraSettings, add_adapter, fingerprint, leave_out_base, trained_parameters
from nami_lightning.models.pretrained import load_pretrained
from nami_lightning.models.text_encoder import TextEncoderConfig
from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.training.batch import MicroBatch
from nami_lightning.training.checks import (
    TrainingIdentity,
    check_data,
    check_precision,
    check_pretrained_weights,
    check_stages,
    check_training,
    model_settings,
)
from nami_lightning.training.curriculum import Curriculum, continue_epoch
from nami_lightning.training.ema import SwapWeights, adapt_ema, ema_note, leave_out_of_ddp, make_ema_model
from nami_lightning.training.frozen_encoders import EncodingModule, LatentPyramid
from nami_lightning.training.loss import FlowLoss, LossByTau
from nami_lightning.training.parallel.first_weights import make_with_first_weights
from nami_lightning.training.parallel.token_groups import make_token_groups
from nami_lightning.training.paths.rectified import DistillationSettings, RectifiedPath, make_path
from nami_lightning.training.paths.straight import TauDistribution
from nami_lightning.training.step_sync import Agreement, SkippedSteps, agree, require_same_start
from nami_lightning.training.strategies import full_tensor, reduce_gradients, shard_parts
from nami_lightning.training.techniques.technique import Technique, Techniques
from nami_lightning.utils.collectives import gather_objects
from nami_lightning.utils.heartbeat import Heartbeat

VALIDATION = "validation"


class NamiModule(EncodingModule):
    """Trains the nested network; owns its stages and the bridges between them.

    Args:
        transformer: makes the network; ``class_path`` and ``init_args`` in a recipe.
        bridge: makes the windows and bridges.
        text_encoder: which frozen models encode prompts.
        autoencoder: which frozen model makes latents.
        resolutions: side in px of each stage's images, coarsest first, each twice the one before.
        curriculum: phases, ratios, learning rates.
        optimizer: makes the optimizer from parameters; the curriculum sets its learning rate. null: torch's AdamW.
        seed: of the weights and of all random numbers.
        tau: distribution of the local time in training.
        tau_mean: mean of its logit; one number, or one a stage.
        tau_std: standard deviation of its logit; likewise.
        tau_uniform_share: share of the uniform part of a ``mixture``.
        loss_weighting: weights of the stages' losses in a step.
        local_velocity_loss: measure the loss in the stage's local time, as written in the paper: times width^2.
        latent_pyramid: ``encode`` the image at each stage's resolution, or ``pool`` the finest latents.
        prompt_dropout: probability of training a sample on the empty prompt.
        gradient_clip_norm: largest norm of a step's gradient; null for no clipping.
        max_skipped_steps: the run ends after so many steps in a row whose loss or gradient isn't finite.
        activation_checkpointing: recompute every so many-th block in the backward pass; 1 is every block, 0 none.
        compile_blocks: compile each block: one graph a kind of block and shape.
        float8: multiply in float8 in the blocks' linear layers; worth it on large ones, compiled.
        pretrained: the start: a run, a NamiPipeline's folder or hub name, or a NamiTransformer2DModel's folder.
        lora: train adapters beside the weights of ``pretrained``, which stay as they are; null: train the weights.
        distillation: learn to sample in few steps from the model of ``pretrained``; null: learn from the data.
        techniques: change the training, not the sampling: see :mod:`nami_lightning.training.techniques`.

    Raises:
        ValueError: numbers of stages that differ, or resolutions that the network can't take.
    """

    def __init__(
        self,
        transformer: Callable[[], NamiTransformer2DModel],
        bridge: Callable[[], BridgeFlow],
        text_encoder: TextEncoderConfig,
        autoencoder: AutoencoderConfig,
        resolutions: list[int],
        curriculum: Curriculum,
        optimizer: OptimizerCallable | None = None,
        seed: int = 0,
        tau: TauKind = "mixture",
        tau_mean: float | list[float] = 0.0,
        tau_std: float | list[float] = 1.0,
        tau_uniform_share: float = 0.1,
        loss_weighting: LossWeighting = "ratio",
        local_velocity_loss: bool = False,
        latent_pyramid: LatentPyramid = "encode",
        prompt_dropout: float = 0.1,
        gradient_clip_norm: float | None = 1.0,
        max_skipped_steps: int = 10,
        activation_checkpointing: int = 0,
        compile_blocks: bool = False,
        float8: bool = False,
        pretrained: str | None = None,
        lora: LoraSettings | None = None,
        distillation: DistillationSettings | None = None,
        techniques: list[Technique] | None = None,
    ) -> None:
        with torch.device("meta"):
            config = dict(transformer().config)
        windows_and_bridges = bridge()
        text_dims = config["joint_attention_dim"], config["pooled_projection_dim"]
        num_stages = windows_and_bridges.num_stages
        super().__init__(text_encoder, autoencoder, text_dims, latent_pyramid, num_stages, seed)
        self.automatic_optimization = False
        self.transformer_config, self.bridge = config, windows_and_bridges
        # Not AdamW as a default above: jsonargparse would hand its settings on to any optimizer that a recipe names.
        self.make_transformer, self.make_optimizer = transformer, optimizer or torch.optim.AdamW
        self.resolutions, self.curriculum = resolutions, curriculum
        tau_distribution = TauDistribution.make(tau, tau_mean, tau_std, tau_uniform_share, num_stages)
        path = make_path(self.bridge, config["patch_size"], tau_distribution, distillation)
        self.flow_loss = FlowLoss(self.bridge, path, local_velocity_loss)
        self.loss_weighting, self.prompt_dropout = loss_weighting, prompt_dropout
        self.gradient_clip_norm, self.max_skipped_steps = gradient_clip_norm, max_skipped_steps
        self.activation_checkpointing = activation_checkpointing
        self.compile_blocks, self.float8 = compile_blocks, float8
        self.pretrained, self.lora, self.distillation = pretrained, lora, distillation
        check_training(max_skipped_steps, pretrained, lora is not None, distillation is not None)
        if lora is not None:
            leave_out_base(self, "transformer.")
            self.strict_loading = False
        check_stages(config, self.bridge, resolutions, curriculum, autoencoder, text_encoder.max_length)
        self.techniques = Techniques(techniques or ()).prepare(config, autoencoder, seed)

        self.step = 0
        """Number of global batches consumed, which is the number of the next one."""
        self.seconds_in_steps = 0.0
        """Seconds spent in training steps since this process began."""
        self.seconds_paused = 0.0
        """Seconds since then in which training paused: in validation, and in callbacks that generate images."""
        self.skipped = SkippedSteps()
        self.stop_requested = self.stop_agreed = False
        """Whether this rank was asked to stop; whether all ranks agreed to stop after this step."""
        self.heartbeat = Heartbeat()
        self.same_on_all_ranks: dict[str, Any] = {}
        """What all ranks must have in common when training starts, besides the step and the data set."""
        self.data_before: str | None = None
        self.accept_changed_data = False
        """The data set that the checkpoint was trained on; whether to go on with another one."""
        self.use_ema = self.ema_on_host = False
        self.pretrained_weights: str | None = None
        """The fingerprint of the weights that a LoRA is trained beside, or a student; no checkpoint holds them."""
        self._ratios: dict[tuple[int, ...], Tensor] = {}
        self.transformer: NamiTransformer2DModel
        self.ema: nn.Module | None = None
        self.running_losses: Tensor
        self.register_buffer("running_losses", torch.full((self.num_stages,), torch.nan))

    @property
    def sampling_transformer(self) -> NamiTransformer2DModel:
        """The network to sample and to validate with, inside :attr:`ema_weights`: the EMA's if there is one."""
        if isinstance(self.ema, NamiTransformer2DModel) and not self.ema_on_host:
            return self.ema
        return self.transformer

    @cached_property
    def ema_weights(self) -> SwapWeights:
        """A ``with`` block in which the trained network holds the EMA's weights, if the EMA has no network to run."""
        return SwapWeights(self.transformer, self.ema if self.sampling_transformer is self.transformer else None)

    def tokens(self, stage: int) -> int:
        """Return the tokens of one square sample of ``stage``, image and text."""
        side = self.resolutions[stage] // self.autoencoder_config.factor // self.transformer_config["patch_size"]
        return side**2 + self.text_encoder_config.max_length

    def setup(self, stage: str) -> None:
        """Refuse a precision that training doesn't support."""
        check_precision(self.trainer.precision)

    def configure_model(self) -> None:
        """Build the network and the EMA's, once; the weights are a pure function of the seed."""
        if hasattr(self, "transformer"):
            return
        settings = self.activation_checkpointing, self.compile_blocks, self.float8
        self.transformer = make_with_first_weights(self.new_transformer, self._strategy, *settings)
        self.pretrained_weights = gather_objects(self.pretrained_weights)[0]
        shard_parts(self.techniques, self._strategy)
        if isinstance(path := self.flow_loss.path, RectifiedPath):
            path.load_teacher(self.pretrained, self.make_transformer, self._strategy, self.compile_blocks)
        if self.use_ema:
            self.ema = make_ema_model(self.transformer, self.make_transformer, self._strategy, self.ema_on_host)
            leave_out_of_ddp(self, "ema")

    def new_transformer(self, weights: bool = True) -> NamiTransformer2DModel:
        """Make the network with a LoRA's adapter, and with the weights that it starts from or without values."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            with torch.device("cpu" if weights else "meta"):
                transformer = self.make_transformer()
            if self.pretrained is not None:
                for note in load_pretrained(self.pretrained, transformer, self.bridge, weights):
                    rank_zero_info(note)
            elif weights:
                transformer.init_weights()
            if weights and (self.lora is not None or self.distillation is not None):
                self.pretrained_weights = fingerprint(transformer)
            if self.lora is not None:
                add_adapter(transformer, self.lora)
        return transformer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make one optimizer over the network, or its adapter alone, and the techniques; the bridges are frozen."""
        return self.make_optimizer([*trained_parameters(self.transformer), *self.techniques.named_parameters()])

    # --- training ----------------------------------------------------------------------------

    def on_train_batch_start(self, batch: list[MicroBatch], batch_idx: int) -> None:
        """Set the learning rate that the curriculum has for this step."""
        rate = self.curriculum.learning_rate(self.step)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def training_step(self, batch: list[MicroBatch], batch_idx: int) -> None:
        """Make one optimizer step from the micro-batches of one global batch."""
        begin = perf_counter()
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        ratio = self.ratio()
        weights = flow.loss_weights(self.loss_weighting, ratio, self.running_losses.nan_to_num(1.0))
        counts = [sum(len(micro) for micro in batch if micro.stage == stage) for stage in range(self.num_stages)]
        losses = torch.zeros(self.num_stages, device=self.device)
        micro_losses = []
        active = self.techniques.active(self.step)
        added = {technique.name: torch.zeros((), device=self.device) for technique in active}
        for number, micro in enumerate(batch, 1):
            self.heartbeat.beat(f"stage {micro.stage + 1}, micro-batch {number} of {len(batch)}")
            share = len(micro) / counts[micro.stage]
            reduce_gradients((self.transformer, *self.techniques), self._strategy, last=number == len(batch))
            error = self.flow_loss(self, self.transformer, micro, micro.step, self.prompt_dropout, techniques=active)
            self.manual_backward(weights[micro.stage] * share * sum(error.added.values(), error.loss))
            micro_losses.append(error.loss.detach())
            for name, value in error.added.items():
                added[name] += weights[micro.stage] * share * value.detach()
            losses[micro.stage] += share * micro_losses[-1]

        self.heartbeat.beat("the update")
        figures = {"loss": (weights * losses).sum()} | {f"loss_{name}": value for name, value in added.items()}
        agreed = agree(self.trainer.strategy, losses, figures, self.clip_gradients_by_norm(), self.stop_requested)
        self.stop_agreed = agreed.stop
        self.step += 1
        if agreed.finite:
            optimizer.step()
            self.skipped.in_row = 0
            self._update_running_losses(agreed.losses, ratio)
            self._log_losses(agreed)
        else:
            self.skipped.add(self.step - 1, batch, micro_losses)
            self._log_metrics({"train/skipped": self.skipped.total})
        optimizer.zero_grad()
        self.heartbeat.beat("the end of a step")
        self.seconds_in_steps += perf_counter() - begin

    def ratio(self) -> Tensor:
        """Return this step's sampling ratio ``(K,)``, sent to the device once a phase: a copy makes the host wait."""
        parts = tuple(self.curriculum.phase(self.step).ratio)
        if parts not in self._ratios:
            self._ratios[parts] = torch.tensor(parts, dtype=torch.float32, device=self.device)
        return self._ratios[parts]

    def on_train_start(self) -> None:
        """Refuse bridges that are not fitted, and ranks that start from different things.

        Raises:
            ValueError: the bridges are not fitted, or the data set is another one than the checkpoint's.
            RuntimeError: the ranks differ; it names in what.
        """
        require_same_start(self.same_on_all_ranks | {"step": self.step, "data set": self.data_identity()})
        if not self.accept_changed_data:
            check_data(self.data_before, self.data_identity())
        if not self.bridge.fitted:
            raise ValueError(
                "the bridges are not fitted: trainer.callbacks needs nami_lightning.callbacks.BridgePretraining"
            )
        self.flow_loss.groups.update(make_token_groups(self.curriculum, self.transformer, self.techniques))

    def on_train_batch_end(self, outputs: Any, batch: list[MicroBatch], batch_idx: int) -> None:
        """End a run that skips every step, once the callbacks have seen this one."""
        self.heartbeat.beat("waiting for data")
        self.skipped.check(self.step - 1, self.max_skipped_steps)

    def clip_gradients_by_norm(self) -> Tensor:
        """Scale the gradient down to ``gradient_clip_norm`` if that is set, and return its norm before that."""
        limit = torch.inf if self.gradient_clip_norm is None else self.gradient_clip_norm
        trained = [*self.transformer.parameters(), *self.techniques.parameters()]
        return full_tensor(torch.nn.utils.clip_grad_norm_(trained, limit))

    def _log_losses(self, agreed: Agreement) -> None:
        """Log the losses, every ``log_every_n_steps`` steps; the progress bar's is on the host, or it would wait."""
        self.log("train/loss", torch.tensor(agreed.figures["loss"]), prog_bar=True, logger=False)
        if self.step % self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        metrics = {f"train/{name}": value for name, value in agreed.figures.items()}
        metrics |= {"train/gradient_norm": agreed.norm, "train/skipped": self.skipped.total}
        trained = [k for k, parts in enumerate(self.curriculum.phase(self.step - 1).ratio) if parts]
        metrics |= {f"train/loss_stage{k + 1}": agreed.stage_losses[k] for k in trained}
        self._log_metrics(metrics)

    def _log_metrics(self, metrics: dict[str, float]) -> None:
        """Log to the loggers themselves: ``self.log`` would repeat the last value of an untrained stage."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.step - 1)

    def _update_running_losses(self, losses: Tensor, ratio: Tensor, momentum: float = 0.99) -> None:
        """Update the running mean of each trained stage's loss; a stage's first loss starts its mean."""
        mean = torch.where(self.running_losses.isnan(), losses, self.running_losses.lerp(losses, 1 - momentum))
        self.running_losses.copy_(torch.where(ratio > 0, mean, self.running_losses))

    # --- validation --------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Validate with the EMA's weights."""
        self._validation_began = perf_counter()
        self.ema_weights.__enter__()

    def on_validation_end(self) -> None:
        """Go on with the trained weights."""
        self.ema_weights.__exit__()
        self.seconds_paused += perf_counter() - self._validation_began

    def validation_step(self, micro: MicroBatch, batch_idx: int) -> None:
        """Measure the loss of a held-out micro-batch, at noise and tau that are the same at every validation."""
        self.heartbeat.beat(f"validation, stage {micro.stage + 1}")
        errors, tau, _ = self.flow_loss(self, self.sampling_transformer, micro, VALIDATION, reduction="none")
        counted = len(micro) - micro.padding
        self.losses_by_tau.add(micro.stage, tau[:counted], errors.mean((1, 2, 3))[:counted])

    def on_validation_epoch_start(self) -> None:
        """Start the sums of the losses by tau."""
        self.losses_by_tau = LossByTau(self.num_stages, self.device)

    def on_validation_epoch_end(self) -> None:
        """Log each stage's loss, and the losses by tau."""
        self.log_dict(self.losses_by_tau.means(self.trainer.strategy), sync_dist=True)

    # --- sampling ----------------------------------------------------------------------------

    def pipeline(self) -> NamiPipeline:
        """Return what has been trained so far as a diffusers pipeline that shares this module's weights.

        Use it inside :attr:`ema_weights`.
        """
        self.heartbeat.beat("sampling")
        sampler = {"solver": "multistep"} if self.distillation is None else self.distillation.sampler
        return self.assemble_pipeline(self.sampling_transformer, self.bridge, self.resolutions[-1], sampler)

    # --- checkpoints -------------------------------------------------------------------------

    @cached_property
    def identity(self) -> TrainingIdentity:
        """What a checkpoint must have in common with this module; its ``check`` refuses another one by a ValueError."""
        settings = model_settings(self.transformer_config, self.bridge, self.resolutions, self.lora)
        settings["techniques"] = self.techniques.trained
        encoders = describe_encoders(self.text_encoder_config, self.autoencoder_config)
        return TrainingIdentity(settings, encoders, self.seed, self.curriculum)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add to the checkpoint what a resume needs, and what it must have in common with it."""
        checkpoint["nami"] = self.identity.state_dict() | {
            "step": self.step,
            "skipped": asdict(self.skipped),
            "ema": self.ema is not None,
            "data": self.data_identity(),
            "pretrained": self.pretrained_weights,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from the checkpoint's step."""
        self.identity.check(checkpoint)
        saved = checkpoint["nami"]
        check_pretrained_weights(saved, self.pretrained, self.pretrained_weights)
        self.step = saved["step"]
        self.skipped = SkippedSteps(**saved.get("skipped", {}))
        self.data_before = saved.get("data")
        if "state_dict" in checkpoint:
            adapt_ema(checkpoint["state_dict"], self.ema is not None)
        if note := ema_note(saved, self.ema is not None):
            rank_zero_info(note)
        continue_epoch(checkpoint)

    def data_identity(self) -> str | None:
        """Return what tells the data set from others, if its DataModule says it."""
        return getattr(getattr(self._trainer, "datamodule", None), "identity", None)
