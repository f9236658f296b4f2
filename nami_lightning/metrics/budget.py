"""What a training has used up to a step, in samples and operations: pure functions of the step.

Nothing is counted while it runs, so no interruption can lose or double anything. Operations are those of the
network's forward and backward passes; the frozen encoders, the optimizer and what checkpointing recomputes are left
out, and so is the fitting of the bridges.
"""

from itertools import accumulate

from nami_lightning.planning.flops import transformer_flops
from nami_lightning.training.curriculum import Curriculum
from nami_lightning.training.module import NamiModule


def samples_before(curriculum: Curriculum, step: int) -> list[int]:
    """Samples of each stage in the steps before ``step``."""
    done = [0] * curriculum.num_stages
    for phase, end in zip(curriculum.phases, accumulate(phase.steps for phase in curriculum.phases), strict=True):
        steps = min(max(step - (end - phase.steps), 0), phase.steps)
        done = [n + steps * parts * curriculum.unit for n, parts in zip(done, phase.ratio, strict=True)]
    return done


def flops_per_sample(module: NamiModule) -> list[int]:
    """Operations of one square sample's forward and backward pass at each stage."""
    text = module.text_encoder_config.max_length
    return [
        transformer_flops(module.transformer_config, stage, module.tokens(stage) - text, text).model
        for stage in range(module.num_stages)
    ]
