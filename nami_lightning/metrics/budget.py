"""The operations of training on one sample, as a pure function of the recipe.

Nothing is counted during a run, so an interruption can't lose anything or count it twice. Operations are those of the
network's forward and backward passes, and of a student's teacher, without the frozen encoders, the optimizer and the
fitting of the bridges.
"""

from dataclasses import replace

from nami_lightning.planning.flops import Flops, transformer_flops
from nami_lightning.training.module import NamiModule


def sample_flops(module: NamiModule, stage: int) -> Flops:
    """Return the operations of training on one square sample of a stage."""
    text = module.text_encoder_config.max_length
    image = module.tokens(stage) - text
    flops = transformer_flops(module.transformer_config, stage, image, text, module.activation_checkpointing)
    calls = 0 if module.distillation is None else module.distillation.teacher_calls
    return replace(flops, forward=flops.forward * (1 + calls))
