"""The curriculum: which phase a step belongs to, its sampling ratio, its learning rate: pure functions of the step.

The data reads the same functions as the optimizer, so nothing is switched at a phase's boundary and a
prefetched batch is never of the wrong phase.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any


@dataclass(frozen=True)
class Phase:
    """A part of training with one sampling ratio and one learning rate.

    Args:
        steps: how long it lasts, at least 1.
        ratio: samples of each stage in a step, in units, coarsest first (NAMI: 4:2:1); a stage may have 0.
        learning_rate: reached after the warm-up.
        warmup_steps: steps of linear change from the phase before (from 0 at the start of training).

    Raises:
        ValueError: a number out of its range.
    """

    steps: int
    ratio: list[int]
    learning_rate: float
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a phase's steps must be at least 1; got {self.steps}")
        if not self.ratio or min(self.ratio) < 0 or sum(self.ratio) == 0:
            raise ValueError(f"a phase's ratio must be numbers >= 0, not all 0; got {self.ratio}")
        if not self.learning_rate > 0:
            raise ValueError(f"a phase's learning_rate must be positive; got {self.learning_rate}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"a phase's warmup_steps must lie in 0..steps ({self.steps}); got {self.warmup_steps}")


class Curriculum:
    """The phases of a training, in order.

    A step is one global batch: ``ratio[k] * unit`` samples of stage k, over all ranks.

    Args:
        phases: at least one; all with the same number of stages.
        unit: samples that one part of a ratio stands for.
        context_parallel: for each stage the number of ranks that share the tokens of a sample; null: 1 for all, which
            share none.

    Raises:
        ValueError: no phase, phases of different numbers of stages, a unit below 1, a ``context_parallel`` that has not
            one number of at least 1 a stage.
    """

    def __init__(self, phases: list[Phase], unit: int, context_parallel: list[int] | None = None) -> None:
        if not phases:
            raise ValueError("a curriculum needs at least one phase")
        if len({len(phase.ratio) for phase in phases}) > 1:
            raise ValueError(f"all phases need one number a stage; got {[phase.ratio for phase in phases]}")
        if unit < 1:
            raise ValueError(f"unit must be at least 1; got {unit}")
        self.phases = list(phases)
        self.unit = unit
        self.context_parallel = context_parallel or [1] * self.num_stages
        if len(self.context_parallel) != self.num_stages or min(self.context_parallel) < 1:
            raise ValueError(
                f"curriculum.context_parallel {self.context_parallel} must have a number of at least 1 for each of the "
                f"{self.num_stages} stages"
            )
        self.ends = list(accumulate(phase.steps for phase in phases))

    @property
    def num_stages(self) -> int:
        """The number of stages, K."""
        return len(self.phases[0].ratio)

    @property
    def total_steps(self) -> int:
        """The number of steps of all phases together."""
        return self.ends[-1]

    def phase_index(self, step: int) -> int:
        """Return the index of the phase of ``step``; a step beyond the end belongs to the last."""
        return min(bisect_right(self.ends, step), len(self.phases) - 1)

    def phase(self, step: int) -> Phase:
        """Return the phase of ``step``."""
        return self.phases[self.phase_index(step)]

    def describe(self, step: int) -> str:
        """Say where in training ``step`` is: ``step 600 of 900, phase 2 of 3``."""
        phase = self.phase_index(min(step, self.total_steps - 1)) + 1
        return f"step {step} of {self.total_steps}, phase {phase} of {len(self.phases)}"

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of ``step``."""
        index = self.phase_index(step)
        phase = self.phases[index]
        before = self.phases[index - 1].learning_rate if index else 0.0
        done = step - (self.ends[index] - phase.steps) + 1
        progress = min(1.0, done / phase.warmup_steps) if phase.warmup_steps else 1.0
        return before + progress * (phase.learning_rate - before)

    def samples(self, step: int) -> list[int]:
        """Return the samples of each stage in the global batch of ``step``."""
        return [parts * self.unit for parts in self.phase(step).ratio]

    def split(self, phase: Phase, stage: int, ranks: int, limit: int) -> tuple[int, int]:
        """Return how many micro-batches of a stage each rank has in a step of a phase, and the samples in each.

        Ranks that share the tokens of their samples have the same micro-batches.

        Args:
            phase: of this curriculum.
            stage: 0 (coarsest) to K-1.
            ranks: the number of all ranks.
            limit: samples in a micro-batch, at most.

        Raises:
            ValueError: the samples don't come out even, or the ranks don't.
        """
        size = self.context_parallel[stage]
        if ranks % size:
            raise ValueError(
                f"curriculum.context_parallel[{stage}] lets {size} ranks share the tokens of a sample, and must divide "
                f"the number of ranks, {ranks}"
            )
        return split_evenly(phase.ratio[stage] * self.unit, ranks // size, limit, stage)

    def runs(self, stage: int) -> list[tuple[int, int]]:
        """Return (steps, samples in each of them) of every phase that trains ``stage``."""
        return [(phase.steps, phase.ratio[stage] * self.unit) for phase in self.phases if phase.ratio[stage]]

    def steps_with(self, stage: int, step: int) -> int:
        """Return how many of the steps before ``step`` train ``stage``."""
        return sum(steps for phase, steps in self._phases_before(step) if phase.ratio[stage])

    def samples_before(self, step: int) -> list[int]:
        """Return the samples of each stage in the steps before ``step``."""
        done = self._phases_before(step)
        return [sum(steps * phase.ratio[k] * self.unit for phase, steps in done) for k in range(self.num_stages)]

    def _phases_before(self, step: int) -> list[tuple[Phase, int]]:
        """Return each phase with the number of its steps that lie before ``step``."""
        return [
            (phase, min(max(step - (end - phase.steps), 0), phase.steps))
            for phase, end in zip(self.phases, self.ends, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return what decides the past: the phases and the unit."""
        return {"phases": [asdict(phase) for phase in self.phases], "unit": self.unit}

    def check_past(self, saved: dict[str, Any], step: int) -> None:
        """Refuse a curriculum whose past, the steps before ``step``, differs from the saved one.

        The running phase may end elsewhere (not before ``step``), so a finished training may be made longer, and what
        follows it may be anything.

        Raises:
            ValueError: naming the phase and the key.
        """
        if saved["unit"] != self.unit:
            raise ValueError(
                f"curriculum.unit was {saved['unit']} in the checkpoint and is {self.unit} now: restore it"
            )
        past = Curriculum([Phase(**phase) for phase in saved["phases"]], saved["unit"])
        for index in range(past.phase_index(max(step - 1, 0)) + 1):
            running = step < past.ends[index] or index == len(past.phases) - 1
            _check_phase(index, past.phases[index], self.phases[index : index + 1], running)
            if running and self.ends[index] < step:
                raise ValueError(
                    f"curriculum.phases[{index}] would end at step {self.ends[index]}, but the checkpoint has "
                    f"already done {step}: give it at least {self.phases[index].steps + step - self.ends[index]} steps"
                )


def _check_phase(index: int, past: Phase, now: Sequence[Phase], running: bool) -> None:
    what = "is running" if running else "is completed"
    way_out = "end this phase where it is and add a new one" if running else "start over with --fresh"
    if not now:
        raise ValueError(f"curriculum.phases[{index}] {what} in the checkpoint but is gone from the recipe: restore it")
    for key, value in asdict(past).items():
        if value != getattr(now[0], key) and not (running and key == "steps"):
            raise ValueError(
                f"curriculum.phases[{index}].{key} was {value} in the checkpoint, and that phase {what}; "
                f"the recipe now says {getattr(now[0], key)}. Restore it, or {way_out}"
            )


def split_evenly(samples: int, ranks: int, limit: int, stage: int) -> tuple[int, int]:
    """Split the samples of one stage over ranks, or groups of ranks: return micro-batches a rank, and samples in each.

    Raises:
        ValueError: they don't come out even, with a unit that would.
    """
    each, rest = divmod(samples, ranks)
    count = -(-each // limit)
    if rest or (each and each % count):
        raise ValueError(
            f"stage {stage + 1}: {samples} samples a step can't be split evenly over {ranks} rank(s) in micro-batches "
            f"of at most {limit}: change curriculum.unit, the phase's ratio, or data.max_micro_batch[{stage}]"
        )
    return count, each // count if count else 0


def continue_epoch(checkpoint: dict[str, Any]) -> None:
    """Let Lightning go on in a checkpoint's epoch, in place: all steps are one.

    A run that was stopped, or a curriculum that was made longer, goes on in it: whether there is another batch is for
    the loader to say. A budget of time (``trainer.max_time``) is a start's: what earlier starts used is forgotten.
    """
    for name in [name for name in checkpoint.get("callbacks", {}) if name.startswith("Timer")]:
        del checkpoint["callbacks"][name]
    loops = checkpoint["loops"]["fit_loop"]
    loops["epoch_loop.batch_progress"]["is_last_batch"] = False
    loops["epoch_progress"]["current"] |= {"processed": 0, "completed": 0}
