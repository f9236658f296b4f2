"""What ``lightning bench gpu`` measures on a GPU, and the stand-in that runs the whole flow small on a CPU."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """A model whose sampling is timed.

    Attributes:
        name: in the tables.
        recipe: of the model.
        overrides: arguments laid over it.
        sides: px of the finest stage, timed eager; of those from 2,048 on one round is enough.
        fast_side: px at which the compiled network and CUDA graphs are timed too.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    sides: tuple[int, ...]
    fast_side: int


@dataclass(frozen=True)
class Training:
    """A training whose step is timed.

    Attributes:
        name: in the tables.
        recipe: of the model.
        overrides: arguments laid over it.
        bare_loop: whether a bare loop beside it has room.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    bare_loop: bool


@dataclass(frozen=True)
class Sizes:
    """All that is measured.

    Attributes:
        title: of the report.
        device: that is measured.
        sampling: models whose sampling is timed; the first one is the goal's.
        steps: solver steps of each stage.
        rounds: medians are of so many.
        training: trainings whose step is timed.
        training_steps: that are timed.
        run: the arguments of ``lightning run`` for the emoji training.
        minutes: that it trains.
    """

    title: str
    device: torch.device
    sampling: tuple[Sampling, ...]
    steps: int
    rounds: int
    training: tuple[Training, ...]
    training_steps: int
    run: tuple[str, ...]
    minutes: float


FINEST_PHASE = "[{steps: 100, ratio: [1, 2, 4], learning_rate: 5.0e-5}]"

GPU = Sizes(
    title="a GPU",
    device=torch.device("cuda"),
    sampling=(
        Sampling("2B", "nami_2b", (), (256, 512, 1024, 2048), 1024),
        Sampling("0.6B", "nami_0.6b", (), (512, 1024), 1024),
    ),
    steps=10,
    rounds=3,
    training=(
        Training(
            "NAMI-0.6B",
            "nami_0.6b",
            ("--curriculum.unit", "8", "--curriculum.phases", FINEST_PHASE, "--trainer.devices", "1"),
            bare_loop=True,
        ),
        Training(
            "NAMI-2B",
            "nami_2b",
            ("--curriculum.unit", "4", "--curriculum.phases", FINEST_PHASE, "--trainer.devices", "1"),
            bare_loop=False,
        ),
    ),
    training_steps=5,
    run=("openmoji_gpu",),
    minutes=7.0,
)

SMALL = (
    "--model.transformer.init_args.num_attention_heads=2",
    "--model.transformer.init_args.joint_attention_dim=384",
    "--model.transformer.init_args.pooled_projection_dim=384",
)

STAND_IN = Sizes(
    title="the stand-in on a CPU",
    device=torch.device("cpu"),
    sampling=(Sampling("stand-in", "openmoji", SMALL, (64, 128), 64),),
    steps=1,
    rounds=1,
    training=(
        Training(
            "stand-in",
            "openmoji",
            (*SMALL, "--curriculum.unit", "1", "--curriculum.phases", FINEST_PHASE),
            bare_loop=True,
        ),
    ),
    training_steps=2,
    run=("openmoji", *SMALL),
    minutes=0.1,
)
