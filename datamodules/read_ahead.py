"""How many steps the workers of a rank read ahead, so that what they hold stays below a number of bytes.

A step that was read lies in shared memory (``/dev/shm``) until the training takes it; with a GPU a thread copies it to
page-locked memory meanwhile. A validation reads ahead too, micro-batch by micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

from nami_lightning.training.curriculum import Curriculum


@dataclass(frozen=True)
class ReadAhead:
    """What the workers of one rank do.

    Attributes:
        workers: number of processes that read; 0: none, the training reads itself.
        steps: number of steps that each of them reads ahead.
        step_bytes: bytes of the largest step; in a validation of the largest micro-batch.
    """

    workers: int
    steps: int
    step_bytes: int

    @property
    def total(self) -> int:
        """The most bytes that are held at once."""
        return max(1, self.workers * self.steps) * self.step_bytes


def largest_step(curriculum: Curriculum, ranks: int, sample_bytes: Callable[[int], int]) -> int:
    """Return the bytes of one rank's share of the largest step.

    Args:
        curriculum: gives the samples of a step.
        ranks: the number of processes that share them; some have the same ones, see ``Curriculum.context_parallel``.
        sample_bytes: returns the bytes of one sample of a stage.
    """
    stages, shared = range(curriculum.num_stages), curriculum.context_parallel
    return max(
        sum(phase.ratio[stage] * curriculum.unit * shared[stage] * sample_bytes(stage) for stage in stages) // ranks
        for phase in curriculum.phases
    )


def plan_read_ahead(step_bytes: int, limit: int, workers: int, prefetch_factor: int) -> ReadAhead:
    """Return how many steps are read ahead: as many as asked for, or as many as the limit allows, but one at least.

    Args:
        step_bytes: bytes of the largest step.
        limit: bytes that may be held.
        workers: number of processes that were asked for.
        prefetch_factor: steps ahead of each that were asked for.
    """
    if not workers:
        return ReadAhead(0, prefetch_factor, step_bytes)
    allowed = max(1, limit // max(1, step_bytes))
    used = min(workers, allowed)
    return ReadAhead(used, min(prefetch_factor, allowed // used), step_bytes)
