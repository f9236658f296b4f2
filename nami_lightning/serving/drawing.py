"""Draws images with a NAMI, one at a time, and tells of each stage as it ends."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from time import perf_counter
from typing import Any

import torch
from PIL import Image

from nami_lightning.models.flow import SolverKind
from nami_lightning.pipelines.lora import load_loras, split_weight
from nami_lightning.pipelines.nami_pipeline import NamiPipeline


@dataclass(frozen=True)
class Settings:
    """All that an image is drawn with.

    Attributes:
        prompt: what to draw.
        negative_prompt: what guidance leads away from.
        seed: of the image's noise.
        height: in px.
        width: in px.
        steps: solver steps of each stage, coarsest first.
        guidance_scale: of each stage; 1 or less is off.
        solver: ``euler``, ``heun`` or ``multistep``.
        loras: weights of the LoRAs that are switched on, by their names on the page.
    """

    prompt: str
    negative_prompt: str
    seed: int
    height: int
    width: int
    steps: list[int]
    guidance_scale: list[float]
    solver: SolverKind
    loras: dict[str, float] = field(default_factory=dict)

    @property
    def row(self) -> dict[str, Any]:
        """The settings as ``lightning sample`` writes them into a PNG."""
        values = asdict(self)
        loras = [{"lora": name, "weight": weight} for name, weight in values.pop("loras").items()]
        return values | {"lora": loras or None}


@dataclass(frozen=True)
class StepDone:
    """A solver step that is done: its stage from 0, its number within the stage from 1."""

    stage: int
    number: int


@dataclass(frozen=True)
class StageDrawn:
    """A stage that is done.

    Attributes:
        stage: its number, from 0.
        image: its estimate of the clean image at its resolution; of the last stage, the image itself.
        seconds: of its solver steps and its bridge; neither encoding the prompt nor decoding the image counts.
    """

    stage: int
    image: Image.Image
    seconds: float


class Stopped(Exception):
    """An exception for a drawing that was asked to stop before its end."""


class Studio:
    """A pipeline with its LoRAs, which draws one image at a time.

    Args:
        pipeline: of a NAMI.
        loras: LoRAs to load: ``FOLDER``, or ``FOLDER:WEIGHT``. All are off until a drawing names them.

    Attributes:
        pipeline: the pipeline.
        weights: the weights that the LoRAs were given, by the names that they have on the page.

    Raises:
        FileNotFoundError: a LoRA that is neither on the disk nor can be fetched.
        ValueError: a LoRA of another model.
    """

    def __init__(self, pipeline: NamiPipeline, loras: Sequence[str] = ()) -> None:
        self.pipeline = pipeline
        pipeline.set_progress_bar_config(disable=True)
        self._own = list(pipeline.get_active_adapters())  # the adapter of a run that trains a LoRA
        adapters = load_loras(pipeline, loras)
        sources = [split_weight(text) for text in loras]
        self._adapters = dict(zip(_names([source for source, _ in sources]), adapters, strict=True))
        self.weights = {name: weight for name, (_, weight) in zip(self._adapters, sources, strict=True)}
        self._lock = Lock()

    def draw(self, settings: Settings, stopped: Callable[[], bool] = lambda: False) -> Generator[StepDone | StageDrawn]:
        """Draw an image; yield each step and each stage when it is done, the image last.

        A drawing whose iterator is closed stops after the step that runs.

        Args:
            settings: of the image.
            stopped: asked after each step whether to stop.

        Raises:
            ValueError: settings that don't fit the model.
            NonFiniteImages: the image is NaN or infinite.
            Stopped: ``stopped`` said so.
        """
        if not settings.prompt.strip():
            raise ValueError("the prompt is empty: type what to draw")
        closed = Event()
        events: SimpleQueue[StepDone | StageDrawn | BaseException | None] = SimpleQueue()

        def work() -> None:
            try:
                with self._lock:
                    self._draw(settings, lambda: closed.is_set() or stopped(), events.put)
                events.put(None)
            except BaseException as error:
                events.put(error)

        Thread(target=work, daemon=True).start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            closed.set()

    def _draw(self, settings: Settings, stopped: Callable[[], bool], report: Callable[[Any], None]) -> None:
        self._switch_loras(settings.loras)
        steps, pipeline = settings.steps, self.pipeline
        begin: list[float] = []
        seconds: list[float] = []
        done = 0

        def before_network(*_: Any) -> None:
            if not begin:  # what came before is the encoding of the prompt
                begin.append(self._now())

        def after_step(_: Any, number: int, __: Any, tensors: dict[str, Any]) -> None:
            nonlocal done
            done, stage = number + 1, pipeline.stage
            in_stage = done - sum(steps[:stage])
            if in_stage == steps[stage]:
                seconds.append(self._now() - begin[-1])
                if stage + 1 < len(steps):
                    report(StageDrawn(stage, pipeline.decode(tensors["clean_latents"])[0], seconds[-1]))
                begin.append(self._now())
            else:
                report(StepDone(stage, in_stage))
            pipeline.interrupt = stopped()

        if stopped():
            raise Stopped
        hook = pipeline.transformer.register_forward_pre_hook(before_network)
        try:
            image = pipeline(
                settings.prompt,
                negative_prompt=settings.negative_prompt,
                height=settings.height,
                width=settings.width,
                num_inference_steps=steps,
                guidance_scale=settings.guidance_scale,
                solver=settings.solver,
                generator=torch.Generator().manual_seed(settings.seed),
                callback_on_step_end=after_step,
                callback_on_step_end_tensor_inputs=["clean_latents"],
            ).images[0]
        finally:
            hook.remove()
        if done < sum(steps):
            raise Stopped
        report(StageDrawn(len(steps) - 1, image, seconds[-1]))

    def _switch_loras(self, weights: dict[str, float]) -> None:
        """Switch the LoRAs on that have a weight, and all others off."""
        active = dict.fromkeys(self._own, 1.0) | {self._adapters[name]: weight for name, weight in weights.items()}
        if active:
            self.pipeline.enable_lora()
            self.pipeline.set_adapters(list(active), list(active.values()))
        elif self._adapters:
            self.pipeline.disable_lora()

    def _now(self) -> float:
        if self.pipeline.device.type == "cuda":
            torch.cuda.synchronize(self.pipeline.device)
        return perf_counter()


def _names(sources: Sequence[str]) -> list[str]:
    """Return a short name for each source, the last part of its path; those of equal names get a number."""
    names: list[str] = []
    for source in sources:
        short = Path(source).resolve().name if Path(source).exists() else source
        number = sum(name == short or name.startswith(f"{short} (") for name in names)
        names.append(f"{short} ({number + 1})" if number else short)
    return names
