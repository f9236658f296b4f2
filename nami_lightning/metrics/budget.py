"""The operations of training, as a pure function of the recipe.

Nothing is counted during a run, so an interruption can't lose anything or count it twice. Operations are those of the
network's forward and backward passes, of a student's teacher and of techniques, without the frozen encoders, the
optimizer and the fitting of the bridges.
"""

from dataclasses import replace
from itertools import pairwise

from nami_lightning.planning.flops import Flops, transformer_flops
from nami_lightning.training.module import NamiModule


def sample_flops(module: NamiModule, stage: int, step: int = 0) -> Flops:
    """Return the operations of training on one square sample of a stage, at a step: a technique may end at one."""
    text = module.text_encoder_config.max_length
    image = module.tokens(stage) - text
    changed = module.techniques.change_flops(module.transformer_config, stage, image, step)
    flops = transformer_flops(
        module.transformer_config, stage, image, text, module.activation_checkpointing, changed.block_tokens
    )
    calls = 0 if module.distillation is None else module.distillation.teacher_calls
    return replace(
        flops,
        forward=flops.forward * (1 + calls) + changed.forward,
        backward=flops.backward + changed.backward,
    )


def training_flops(module: NamiModule, steps: int) -> int:
    """Return the operations of the first ``steps`` steps, without what activation checkpointing does again."""
    ends = [one.end_step for one in module.techniques.active(0) if one.end_step is not None and one.end_step < steps]
    total = 0
    for begin, end in pairwise(sorted({0, *ends, steps})):
        before, after = module.curriculum.samples_before(begin), module.curriculum.samples_before(end)
        for stage in range(module.num_stages):
            total += (after[stage] - before[stage]) * sample_flops(module, stage, begin).model
    return total
