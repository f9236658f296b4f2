"""Write the folder of a NamiPipeline part by part, so that no more than one part is in memory at a time."""

import shutil
from pathlib import Path
from typing import Any

from diffusers import __version__ as diffusers_version

from nami_lightning.conversion.weights import read_config
from nami_lightning.models.text_encoder import TextSettings
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.utils.atomic_write import write_json

INDEX = "model_index.json"
OURS = "nami_lightning.models"
SHARD_SIZE = "2GB"
ENCODERS = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
"""The parts that a conversion does not change."""

Home = tuple[str | None, str | None]
"""The package and the class of a part; None and None for a part that the pipeline does without."""


class PipelineFolder:
    """A pipeline's folder in the making.

    Args:
        folder: to be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.homes: dict[str, Home] = dict.fromkeys(ENCODERS, (None, None))

    def save(self, part: str, model: Any, package: str) -> None:
        """Save a model, or a tokenizer, as a part.

        Args:
            part: its name in the pipeline.
            model: what has ``save_pretrained``.
            package: from which its class is imported.
        """
        limit = {} if part.startswith("tokenizer") else {"max_shard_size": SHARD_SIZE}
        model.save_pretrained(self.folder / part, **limit)
        self.homes[part] = (package, type(model).__name__)

    def save_encoders(self, pipeline: NamiPipeline) -> None:
        """Save the autoencoder, the text encoders and the tokenizers of a pipeline in memory."""
        for part in ENCODERS:
            model = getattr(pipeline, part)
            if model is not None:
                package = type(model).__module__.split(".")[0]
                self.save(part, model, OURS if package == "nami_lightning" else package)

    def copy_encoders(self, source: Path) -> None:
        """Copy the files of the autoencoder, the text encoders and the tokenizers of another pipeline's folder."""
        index = read_config(source / INDEX)
        for part in ENCODERS:
            home = index.get(part) or (None, None)
            if home[1] is not None:
                shutil.copytree(source / part, self.folder / part)
                self.homes[part] = (home[0], home[1])

    def finish(self, resolution: int, text: TextSettings, **sampler: Any) -> None:
        """Write ``model_index.json``, which makes the folder a pipeline's.

        Args:
            resolution: px of the finest stage.
            text: how text states are made.
            sampler: the model's defaults of a call: ``num_inference_steps``, ``guidance_scale``, ``solver``.
        """
        index = {
            "_class_name": NamiPipeline.__name__,
            "_diffusers_version": diffusers_version,
            **{part: list(home) for part, home in sorted(self.homes.items())},
            "resolution": resolution,
            "max_sequence_length": text.max_length,
            "pooled_max_length": text.pooled_max_length,
            "attention_mask": text.attention_mask,
            "zero_padding": text.zero_padding,
            "pooling": text.pooling,
            **sampler,
        }
        write_json(self.folder / INDEX, index)


def text_settings_of(index: dict[str, Any]) -> TextSettings:
    """Return the text settings that a NamiPipeline's ``model_index.json`` states."""
    defaults = TextSettings()
    return TextSettings(
        max_length=index.get("max_sequence_length", defaults.max_length),
        pooled_max_length=index.get("pooled_max_length"),
        attention_mask=index.get("attention_mask", True),
        zero_padding=index.get("zero_padding", True),
        pooling=index.get("pooling"),
    )
