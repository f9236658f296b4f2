"""Checks across the parts of a recipe: all describe the same stages, and a checkpoint belongs to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from nami_lightning.models.autoencoder import AutoencoderConfig
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.encoder_revisions import EncoderDescriptions, first_difference
from nami_lightning.models.lora import NO_LORA, LoraSettings
from nami_lightning.models.transformer import SETTINGS_BEFORE as TRANSFORMER_BEFORE
from nami_lightning.training.curriculum import Curriculum

SETTINGS_BEFORE = {f"transformer.{key}": value for key, value in TRANSFORMER_BEFORE.items()} | {
    "bridge.time": "noise_level",
    "bridge.velocity_time": "global",
    "bridge.timestep_spacing": "even",
    "techniques": {},
}
"""Settings of the model that checkpoints of earlier versions lack, and what they were then; None, if not listed."""


SUPPORTED_PRECISIONS = ("32-true", "bf16-mixed")
SHORT_NAMES = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
"""Lightning's own short names of precisions, with their full names."""


def check_precision(precision: object) -> str:
    """Refuse a precision for which Lightning would convert whole batches, or scale the loss that clipping sees.

    Args:
        precision: a recipe's ``trainer.precision``, or a Trainer's.

    Returns:
        Its full name.

    Raises:
        ValueError: naming those that work.
    """
    given = "32-true" if precision is None else str(precision)
    name = SHORT_NAMES.get(given, given)
    if name not in SUPPORTED_PRECISIONS:
        raise ValueError(
            f"trainer.precision {name} is not supported: use 32-true, or bf16-mixed; with FSDP2Strategy its "
            "param_dtype computes in bfloat16"
        )
    return name


def check_stages(
    transformer: dict[str, Any],
    bridge: BridgeFlow,
    resolutions: list[int],
    curriculum: Curriculum,
    vae: AutoencoderConfig,
    text_tokens: int,
) -> None:
    """Refuse parts that do not describe the same stages, or tokens that ranks can't share.

    Raises:
        ValueError: naming the recipe key.
    """
    stages = {
        "resolutions": len(resolutions),
        "curriculum.phases[].ratio": curriculum.num_stages,
        "model.bridge.window_ratios": bridge.num_stages,
        "model.transformer.num_layers": len(transformer["num_layers"]),
    }
    if len(set(stages.values())) > 1:
        listing = ", ".join(f"{key} has {number}" for key, number in stages.items())
        raise ValueError(f"every stage needs one entry in each list, but {listing}")
    if transformer["in_channels"] != bridge.config.channels:
        raise ValueError(
            f"model.bridge.channels is {bridge.config.channels} and model.transformer.in_channels "
            f"{transformer['in_channels']}: both are the channels of the latents, make them equal"
        )
    if any(fine != 2 * coarse for coarse, fine in pairwise(resolutions)):
        raise ValueError(f"each of resolutions {resolutions} must be twice the one before")
    multiple = transformer["patch_size"] * vae.factor
    if odd := [side for side in resolutions if side % multiple or side < multiple]:
        raise ValueError(
            f"resolutions {odd} are not multiples of {multiple} px, the patch size {transformer['patch_size']} times "
            f"the autoencoder's factor {vae.factor}"
        )
    windows = bridge.windows[-1]
    if transformer["prediction"] == "clean" and (windows.times, windows.velocity_time) != (None, "global"):
        raise ValueError(
            "model.transformer.prediction clean needs a bridge with time noise_level and velocity_time global: the "
            "clean image is the point minus the time times the velocity"
        )
    for stage, size in enumerate(curriculum.context_parallel):
        numbers = {
            "attention heads": transformer["num_attention_heads"],
            "text tokens": text_tokens,
            "image tokens": (resolutions[stage] // multiple) ** 2,
        }
        if uneven := [f"{number} {name}" for name, number in numbers.items() if number % size]:
            raise ValueError(
                f"curriculum.context_parallel[{stage}] lets {size} ranks share a sample, but {size} does not divide "
                f"its {' and its '.join(uneven)}"
            )


def check_shapes(
    shapes: Sequence[tuple[Fraction, Fraction]],
    resolution: int,
    transformer: dict[str, Any],
    vae: AutoencoderConfig,
    context_parallel: Sequence[int],
) -> None:
    """Refuse images that the network can't cut into patches, or whose patches ranks can't share.

    Args:
        shapes: width and height in px of all kinds of images at ``resolution``; at the others they are doubled.
        resolution: of the coarsest stage.
        transformer: its config.
        vae: whose factor divides their sides first.
        context_parallel: the number of ranks that share a sample, of each stage.

    Raises:
        ValueError: naming the recipe key.
    """
    multiple = transformer["patch_size"] * vae.factor
    if odd := [f"{width}x{height}" for width, height in shapes if width % multiple or height % multiple]:
        raise ValueError(
            f"data.preparation.aspect_step must be a multiple of {multiple} px, the patch size "
            f"{transformer['patch_size']} times the autoencoder's factor {vae.factor}: at {resolution} px, stage 1's, "
            f"the data set has images of {', '.join(odd)} px. Prepare it with another aspect_step"
        )
    for stage, size in enumerate(context_parallel):
        tokens = {int(width * height) * 4**stage // multiple**2 for width, height in shapes}
        if odd := [str(number) for number in sorted(tokens) if number % size]:
            raise ValueError(
                f"curriculum.context_parallel[{stage}] lets {size} ranks share a sample, but some images of the data "
                f"set have {', '.join(odd)} tokens there: choose a number that divides them"
            )


def model_settings(
    transformer: dict[str, Any], bridge: BridgeFlow, resolutions: list[int], lora: LoraSettings | None
) -> dict[str, Any]:
    """Return the settings without which a checkpoint's weights mean something else, as plain values."""
    adapter = NO_LORA if lora is None else lora.describe()
    parts = {"transformer": transformer, "bridge": dict(bridge.config), "lora": adapter}
    settings = {
        f"{part}.{key}": list(value) if isinstance(value, tuple) else value
        for part, config in parts.items()
        for key, value in config.items()
        if not key.startswith("_")
    }
    return settings | {"resolutions": list(resolutions)}


@dataclass(frozen=True)
class TrainingIdentity:
    """What a checkpoint and the recipe that goes on from it must have in common.

    Attributes:
        model: the settings without which the weights mean something else.
        encoders: what :func:`~nami_lightning.models.encoder_revisions.describe_encoders` says of the frozen encoders.
        seed: of the run.
        curriculum: its past must be the checkpoint's.
    """

    model: dict[str, Any]
    encoders: EncoderDescriptions
    seed: int
    curriculum: Curriculum

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it, as plain values."""
        curriculum = self.curriculum.state_dict()
        return {"model": self.model, "encoders": self.encoders, "seed": self.seed, "curriculum": curriculum}

    def check(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, or of a training that went otherwise.

        The dtype of the frozen encoders may differ: another machine may need another one. What a checkpoint of an
        earlier version does not hold is not compared.

        Raises:
            ValueError: saying which setting differs.
        """
        if "nami" not in checkpoint:
            raise ValueError("this checkpoint was not written by nami_lightning")
        saved = checkpoint["nami"]
        settings = self.model | ({} if "encoders" in saved else self._encoders_by_name(saved["model"]))
        for key, value in settings.items():
            if (was := saved["model"].get(key, SETTINGS_BEFORE.get(key))) != value:
                raise _of_another_model(key, was, value)
        encoders = saved.get("encoders", self.encoders)
        if difference := first_difference(encoders, self.encoders, ignored=("dtype",)):
            raise _of_another_model(*difference)
        if saved.get("seed", self.seed) != self.seed:
            raise ValueError(
                f"the checkpoint's seed is {saved['seed']}, this recipe's {self.seed}: its samples and random numbers "
                "would be others. Restore the seed, or start over with --fresh"
            )
        self.curriculum.check_past(saved["curriculum"], saved["step"])

    def _encoders_by_name(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Return the encoders' names as earlier versions saved them among the model's settings, without subfolders."""
        names = {key: encoder and str(encoder["name"]) for key, encoder in self.encoders.items()}
        vae, saved_vae = names["model.autoencoder"], saved.get("autoencoder.name")
        return {
            "text_encoder.sequence": names["model.text_encoder.sequence"],
            "text_encoder.pooled": names["model.text_encoder.pooled"],
            "autoencoder.name": saved_vae if vae and vae.startswith(f"{saved_vae}/") else vae,
        }


def _of_another_model(key: str, was: Any, now: Any) -> ValueError:
    return ValueError(
        f"the checkpoint is of another model: its {key} is {was}, this recipe's {now}. Resume with the recipe it was "
        "made with, or start over with --fresh"
    )


def check_data(before: str | None, now: str | None) -> None:
    """Refuse another data set than the checkpoint's; where either is not known, none is refused.

    Raises:
        ValueError: naming what can be done.
    """
    if None in (before, now) or before == now:
        return
    raise ValueError(
        f"the data set is not the one that this run was trained on so far ({now}, not {before}): restore it, go on "
        "with the new one by --accept_changed_data, or start over with --fresh"
    )


def check_training(max_skipped_steps: int, pretrained: str | None, lora: bool, distillation: bool) -> None:
    """Refuse settings of the training that can't be right: a LoRA or a distillation without weights to begin from.

    Raises:
        ValueError: naming the recipe keys.
    """
    if max_skipped_steps < 1:
        raise ValueError(f"model.max_skipped_steps must be at least 1; got {max_skipped_steps}")
    if pretrained is None and lora:
        raise ValueError("model.lora trains adapters beside trained weights: name their folder as model.pretrained")
    if pretrained is None and distillation:
        raise ValueError("model.distillation learns from a trained model: name that one as model.pretrained")


def check_pretrained_weights(saved: dict[str, Any], source: str | None, now: str | None) -> None:
    """Refuse the checkpoint of a LoRA or a student that was trained beside other weights than those there now.

    Args:
        saved: what the checkpoint says of itself.
        source: ``model.pretrained``.
        now: the fingerprint of the weights there; None: neither a LoRA nor a student.

    Raises:
        ValueError: naming both fingerprints.
    """
    before = saved.get("pretrained")
    if now is not None and before != now:
        raise ValueError(
            f"model.pretrained {source} does not hold the weights that this run was trained beside "
            f"(fingerprint {now}, not {before}): restore them, or start over with --fresh"
        )
