"""A NAMI network's way from and to FLUX: its weights are FLUX's, with FLUX's names."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import FromOriginalModelMixin
from torch import Tensor

RopePositions = Literal["aligned", "grid"]
HeadKind = Literal["shared", "per_stage"]


class FluxWeightsMixin(FromOriginalModelMixin):
    """Makes a NAMI network of FLUX's weights, and FLUX of a NAMI network's."""

    @classmethod
    def from_flux(
        cls,
        flux: FluxTransformer2DModel,
        num_layers: Sequence[int] | None = None,
        num_single_layers: Sequence[int] | None = None,
        patch_size: int = 2,
        rope_positions: RopePositions = "aligned",
        output_head: HeadKind = "shared",
    ) -> Self:
        """Make a NAMI that has FLUX's weights; the tensors are FLUX's own, so that this takes no more memory.

        Args:
            flux: without a guidance embedding.
            num_layers: how its double blocks split over the stages; None is one stage.
            num_single_layers: how its single blocks split over the stages.
            patch_size: latents a token side; FLUX packs 2x2.
            rope_positions: see the class.
            output_head: see the class; every stage's head starts as FLUX's.

        Raises:
            ValueError: a guidance-distilled FLUX, or splits that do not add up to its depth.
        """
        config = flux.config
        if config.guidance_embeds:
            raise ValueError(
                "this FLUX has a guidance embedding, which NAMI has not (FLUX.1-dev): use a model trained without "
                "(FLUX.1-schnell)"
            )
        num_layers = num_layers or [config.num_layers]
        num_single_layers = num_single_layers or [config.num_single_layers]
        if (sum(num_layers), sum(num_single_layers)) != (config.num_layers, config.num_single_layers):
            raise ValueError(
                f"num_layers {list(num_layers)} and num_single_layers {list(num_single_layers)} must add up to "
                f"FLUX's {config.num_layers} and {config.num_single_layers}"
            )
        with torch.device("meta"):
            model = cls(
                in_channels=config.in_channels // patch_size**2,
                patch_size=patch_size,
                num_layers=num_layers,
                num_single_layers=num_single_layers,
                attention_head_dim=config.attention_head_dim,
                num_attention_heads=config.num_attention_heads,
                joint_attention_dim=config.joint_attention_dim,
                pooled_projection_dim=config.pooled_projection_dim,
                axes_dims_rope=config.axes_dims_rope,
                rope_positions=rope_positions,
                output_head=output_head,
            )
        model.load_state_dict(with_heads(flux.state_dict(), output_head, model.num_stages), assign=True)
        return model

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: Any,
        num_layers: Sequence[int] | None = None,
        num_single_layers: Sequence[int] | None = None,
        patch_size: int = 2,
        rope_positions: RopePositions = "aligned",
        output_head: HeadKind = "shared",
        **kwargs: Any,
    ) -> Self:
        """Make a NAMI of a file with FLUX's weights, in the layout of its authors or of diffusers.

        Args:
            pretrained_model_link_or_path_or_dict: path or link of a safetensors file, or its weights by name.
            num_layers: see :meth:`from_flux`, as the following four.
            num_single_layers: likewise.
            patch_size: likewise.
            rope_positions: likewise.
            output_head: likewise.
            kwargs: of diffusers' ``FluxTransformer2DModel.from_single_file``; ``config`` and ``subfolder`` name a
                FLUX's configuration, without which it is fetched from the hub.
        """
        flux = FluxTransformer2DModel.from_single_file(pretrained_model_link_or_path_or_dict, **kwargs)
        return cls.from_flux(flux, num_layers, num_single_layers, patch_size, rope_positions, output_head)

    def to_flux(self) -> FluxTransformer2DModel:
        """Return the last stage's network as diffusers' own FLUX, for tools that know it; it shares the weights.

        Raises:
            ValueError: the network predicts clean images.
        """
        config = self.config
        if config.prediction == "clean":
            raise ValueError("this network's finest stage predicts clean images, and FLUX velocities: it can't be FLUX")
        with torch.device("meta"):
            flux = FluxTransformer2DModel(
                patch_size=1,
                in_channels=config.in_channels * config.patch_size**2,
                num_layers=sum(config.num_layers),
                num_single_layers=sum(config.num_single_layers),
                attention_head_dim=config.attention_head_dim,
                num_attention_heads=config.num_attention_heads,
                joint_attention_dim=config.joint_attention_dim,
                pooled_projection_dim=config.pooled_projection_dim,
                axes_dims_rope=tuple(config.axes_dims_rope),
            )
        last = f"heads.{self.num_stages - 1}."
        weights = {
            name.removeprefix(last): tensor
            for name, tensor in self.state_dict().items()
            if name.startswith(last) or not name.startswith("heads.")
        }
        flux.load_state_dict(weights, assign=True)
        return flux


def with_heads(weights: Mapping[str, Tensor], output_head: HeadKind, stages: int) -> dict[str, Tensor]:
    """Return weights with FLUX's names, with a copy of its one head for each stage if ``output_head`` asks for that."""
    if output_head == "shared":
        return dict(weights)
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.startswith(("norm_out.", "proj_out.")):
            named |= {f"heads.{stage}.{name}": tensor.clone() for stage in range(stages)}
        else:
            named[name] = tensor
    return named
