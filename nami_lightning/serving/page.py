"""The page: its layout, and what its buttons do."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

import gradio as gr

from nami_lightning.errors import is_user_error, one_line
from nami_lightning.models.flow import SolverKind
from nami_lightning.pipelines.png_settings import save_with_settings
from nami_lightning.pipelines.stages import share_steps
from nami_lightning.serving.costs import cost_table, stage_costs
from nami_lightning.serving.drawing import Settings, StageDrawn, StepDone, Stopped, Studio

KEPT = 60
"""Images in a session's history; the oldest goes first."""

STEPS: dict[str, Any] = {"precision": 0, "minimum": 1, "maximum": 500, "min_width": 80}
GUIDANCE: dict[str, Any] = {"minimum": 0, "maximum": 50, "step": 0.5, "min_width": 80}
MOST_PROMPT = 4000
"""Characters of a prompt."""

MOST_SEED = 2**32 - 1
REFRESH = 0.25
"""Seconds between two updates of the progress: the page's own work takes time from the drawing."""

SMALL = 256
"""Images up to this side in px are shown with their pixels as squares."""

CSS = """
.gradio-container {max-width: 1280px !important}
.gradio-container main {padding: 4px 16px !important}
#title h1 {font-size: 1.15rem; margin: 0}
#title h1 span {font-weight: 400; opacity: .7}
.tight {gap: 8px !important}
.labels [data-testid="block-info"] {font-size: .75rem; white-space: nowrap}
.stage img {width: 100% !important; height: 100% !important; object-fit: contain !important}
#history .grid-container {grid-template-columns: repeat(8, minmax(0, 1fr)) !important}
.small img {image-rendering: pixelated}
#stages {align-items: flex-end}
#status {min-height: 1.4em; font-variant-numeric: tabular-nums}
table.costs {width: 100% !important; margin: 0 !important; border: 0 !important; border-collapse: collapse}
table.costs * {border: 0 !important; white-space: nowrap; font-variant-numeric: tabular-nums; font-size: .8rem}
table.costs th, table.costs td {text-align: right !important; padding: 1px 6px !important}
table.costs th:first-child, table.costs td:first-child {text-align: left !important; padding-left: 0 !important}
table.costs thead th {border-bottom: 1px solid var(--border-color-primary) !important}
table.costs tbody tr:last-child td {border-top: 1px solid var(--border-color-primary) !important; font-weight: 600}
table.costs th:nth-child(n+7), table.costs td:nth-child(n+7) {opacity: .7}
p.note {font-size: .75rem !important; margin: 4px 0 0 !important}
"""


@dataclass(frozen=True)
class Drawn:
    """An image of the history.

    Attributes:
        settings: what it was drawn with.
        stages: PNGs of its stages; the last is the image, with its settings in it.
        table: what its stages cost, as HTML.
    """

    settings: Settings
    stages: list[Path]
    table: str


def theme() -> Any:
    """Return a theme whose fonts are the system's: nothing is fetched."""
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.themes.Default(spacing_size="sm", text_size="sm", **fonts)


class Page:
    """The page of a studio.

    Args:
        studio: what draws.
        weights: what its images say of its weights: ``model``, its name for people, and more.
        folder: for the images.

    Attributes:
        blocks: the page, for gradio.
    """

    def __init__(self, studio: Studio, weights: Mapping[str, Any], folder: Path) -> None:
        self.studio, self.weights, self.folder = studio, weights, folder
        name = weights["model"]
        self._numbers = count(1)
        self._to_stop: set[str] = set()
        with gr.Blocks(title=f"{name} - nami_lightning", analytics_enabled=False) as self.blocks:
            gr.HTML(f"<h1>nami_lightning <span>{escape(name)}</span></h1>", elem_id="title", padding=False)
            self.history = gr.State([], delete_callback=_remove)
            with gr.Row():
                with gr.Column(scale=4, min_width=340, elem_classes="tight"):
                    self._controls()
                with gr.Column(scale=8, min_width=480, elem_classes="tight"):
                    self._results()
            self._connect()

    # --- layout ------------------------------------------------------------------------------------

    def _controls(self) -> None:
        config, bridge = self.studio.pipeline.config, self.studio.pipeline.bridge
        stages, side = bridge.num_stages, config.resolution
        guidance = config.guidance_scale
        guidance = list(guidance) if isinstance(guidance, list | tuple) else [guidance] * stages
        steps = share_steps(config.num_inference_steps or [10] * stages, [1] * stages)
        self.prompt = gr.Textbox(label="Prompt", lines=2, max_length=MOST_PROMPT, elem_id="prompt", autofocus=True)
        self.negative = gr.Textbox(
            label="Negative prompt (where guidance is above 1)", max_length=MOST_PROMPT, elem_id="negative"
        )
        with gr.Row(elem_classes="tight"):
            self.draw_button = gr.Button("Draw", variant="primary", elem_id="draw", min_width=90)
            self.stop_button = gr.Button("Stop", variant="stop", elem_id="stop", min_width=90, interactive=False)
        names = [f"stage {stage + 1}" for stage in range(stages)]
        with gr.Row(elem_classes=["tight", "labels"]):
            self.steps = [
                gr.Number(value, label=f"Steps, {name}", elem_id=f"steps{number}", **STEPS)
                for number, (name, value) in enumerate(zip(names, steps, strict=True), 1)
            ]
        with gr.Row(elem_classes=["tight", "labels"]):
            self.guidance = [
                gr.Number(value, label=f"Guidance, {name}", elem_id=f"guidance{number}", **GUIDANCE)
                for number, (name, value) in enumerate(zip(names, guidance, strict=True), 1)
            ]
        with gr.Row(elem_classes="tight"):
            self.solver = gr.Dropdown(
                list(get_args(SolverKind)), value=config.solver, label="Solver", min_width=120, elem_id="solver"
            )
            size: dict[str, Any] = {
                "precision": 0,
                "minimum": 1,
                "maximum": 4 * side,
                "step": self.studio.pipeline._multiple,
            }
            self.width = gr.Number(side, label="Width, px", min_width=70, elem_id="width", **size)
            self.height = gr.Number(side, label="Height, px", min_width=70, elem_id="height", **size)
        with gr.Row(elem_classes="tight"):
            self.seed = gr.Number(
                0, label="Seed", precision=0, minimum=0, maximum=MOST_SEED, min_width=90, elem_id="seed"
            )
            self.random = gr.Checkbox(True, label="a random seed each time", min_width=90, elem_id="random")
        self.loras: list[tuple[Any, Any]] = []
        for number, (name, weight) in enumerate(self.studio.weights.items(), 1):
            with gr.Row(elem_classes="tight"):
                on = gr.Checkbox(False, label=f"LoRA {name}", min_width=90, elem_id=f"lora{number}")
                value = gr.Number(
                    weight, label="weight", minimum=-10, maximum=10, step=0.1, min_width=70, elem_id=f"weight{number}"
                )
                self.loras.append((on, value))

    def _results(self) -> None:
        stages = self.studio.pipeline.bridge.num_stages
        small = self.studio.pipeline.config.resolution <= SMALL
        with gr.Row(elem_classes="tight", elem_id="stages"):
            self.pictures = [
                gr.Image(
                    label=f"Stage {stage + 1}" if stage + 1 < stages else "The image",
                    format="png",
                    type="filepath",
                    interactive=False,
                    scale=stage + 2,
                    min_width=100,
                    height=110 + 80 * (stage + 4 - stages),
                    buttons=["fullscreen"],
                    elem_id=f"stage{stage + 1}",
                    elem_classes=["stage", "small"] if small else "stage",
                )
                for stage in range(stages)
            ]
        with gr.Row(elem_classes="tight"):
            self.status = gr.HTML("", elem_id="status", padding=False)
            self.download = gr.DownloadButton(
                "Download the image, with its settings", interactive=False, size="sm", elem_id="download"
            )
        self.table = gr.HTML("", elem_id="costs", padding=False)
        self.gallery = gr.Gallery(
            label="This session's images: click one to have its settings back",
            columns=8,
            height=220,
            allow_preview=False,
            interactive=False,
            object_fit="contain",
            buttons=[],
            elem_id="history",
            elem_classes=["small"] if small else None,
        )

    # --- what the buttons do -----------------------------------------------------------------------

    @property
    def _settings(self) -> list[Any]:
        """The controls of an image's settings, in the order of :meth:`_read` and :meth:`_write`."""
        plain = [self.prompt, self.negative, self.seed, self.random, self.height, self.width, self.solver]
        return [*plain, *self.steps, *self.guidance, *(one for pair in self.loras for one in pair)]

    def _connect(self) -> None:
        results = [*self.pictures, self.status, self.table, self.seed, self.download, self.gallery, self.history]
        buttons = [self.draw_button, self.stop_button]
        drawing = gr.on(
            [self.draw_button.click, self.prompt.submit],
            self._begin,
            None,
            buttons,
            queue=False,
            api_visibility="private",
        )
        drawing = drawing.then(
            self._draw,
            [self.history, *self._settings],
            results,
            concurrency_limit=1,
            show_progress="hidden",
            api_name="draw",
        )
        ended = {"outputs": [*buttons, self.status], "queue": False, "api_visibility": "private"}
        drawing.success(self._end, self.status, **ended)
        drawing.failure(self._end, None, **ended)
        self.stop_button.click(self._stop, None, self.status, queue=False, api_name="stop")
        self.gallery.select(
            self._restore,
            self.history,
            [*self._settings, *self.pictures, self.status, self.table, self.download],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )

    def _begin(self, request: gr.Request) -> tuple[Any, Any]:
        self._to_stop.discard(str(request.session_hash))
        return gr.Button(interactive=False), gr.Button(interactive=True)

    def _end(self, status: str = "") -> tuple[Any, Any, str]:
        return gr.Button(interactive=True), gr.Button(interactive=False), status

    def _stop(self, request: gr.Request) -> str:
        self._to_stop.add(str(request.session_hash))
        return "Stopping ..."

    def _draw(self, request: gr.Request, history: list[Drawn], *values: Any) -> Iterator[dict[Any, Any]]:
        """Draw an image; yield what changes on the page."""
        session = str(request.session_hash)
        try:
            settings = self._read(values)
            yield {self.seed: settings.seed, self.status: "Reading the prompt ..."} | dict.fromkeys(self.pictures)
            costs = stage_costs(self.studio.pipeline, settings)
            paths: list[Path] = []
            seconds: list[float] = []
            shown = perf_counter()
            for event in self.studio.draw(settings, lambda: session in self._to_stop):
                if isinstance(event, StepDone):
                    if perf_counter() - shown > REFRESH:
                        shown = perf_counter()
                        yield {self.status: _progress(settings, event.stage, event.number)}
                    continue
                paths.append(self._save(settings, event))
                seconds.append(event.seconds)
                table = cost_table(settings, costs, seconds)
                yield {
                    self.pictures[event.stage]: paths[-1],
                    self.table: table,
                    self.status: _progress(settings, event.stage, settings.steps[event.stage]),
                }
        except Stopped:
            yield {self.status: "Stopped."}
            return
        except Exception as error:
            raise gr.Error(escape(one_line(error)), print_exception=not is_user_error(error)) from error
        finally:
            self._to_stop.discard(session)
        _remove(history[KEPT - 1 :])
        history = [Drawn(settings, paths, table), *history[: KEPT - 1]]
        yield dict(zip(self.pictures, paths, strict=True)) | {
            self.seed: settings.seed,
            self.table: table,
            self.status: f"Drawn in {sum(seconds):.2f} s.",
            self.download: gr.DownloadButton(value=paths[-1], interactive=True),
            self.gallery: gr.Gallery(
                [(one.stages[-1], _caption(one.settings)) for one in history], selected_index=None
            ),
            self.history: history,
        }

    def _restore(self, history: list[Drawn], chosen: gr.SelectData) -> dict[Any, Any]:
        """Bring an image of the history back: its settings, its stages and its table."""
        drawn = history[int(chosen.index)]
        return (
            dict(zip(self._settings, self._write(drawn.settings), strict=True))
            | dict(zip(self.pictures, drawn.stages, strict=True))
            | {
                self.status: "The settings of this image are back.",
                self.table: drawn.table,
                self.download: gr.DownloadButton(value=drawn.stages[-1], interactive=True),
            }
        )

    # --- settings ----------------------------------------------------------------------------------

    def _read(self, values: tuple[Any, ...]) -> Settings:
        """Return the settings that the controls have.

        Raises:
            ValueError: a number is missing.
        """
        prompt, negative, seed, any_seed, height, width, solver, *rest = values
        stages = len(self.steps)
        steps, guidance, loras = rest[:stages], rest[stages : 2 * stages], rest[2 * stages :]
        if any_seed:
            seed = random.randrange(MOST_SEED)
        if None in (seed, height, width, solver, *steps, *guidance, *loras[1::2]):
            raise ValueError("a number is missing: fill all fields in")
        switched = zip(self.studio.weights, loras[::2], loras[1::2], strict=True)
        weights = {name: float(weight) for name, on, weight in switched if on}
        return Settings(prompt or "", negative or "", seed, height, width, steps, guidance, solver, weights)

    def _write(self, settings: Settings) -> list[Any]:
        """Return the values of the controls that :meth:`_read` would read as these settings."""
        plain = [settings.prompt, settings.negative_prompt, settings.seed, False]
        loras: list[Any] = []
        for name, weight in self.studio.weights.items():
            loras += [name in settings.loras, settings.loras.get(name, weight)]
        return [
            *plain,
            settings.height,
            settings.width,
            settings.solver,
            *settings.steps,
            *settings.guidance_scale,
            *loras,
        ]

    def _save(self, settings: Settings, drawn: StageDrawn) -> Path:
        """Write a stage's image into the folder; the last stage's with its settings."""
        last = drawn.stage + 1 == len(self.pictures)
        path = self.folder / f"{next(self._numbers):05d}_seed{settings.seed}.png"
        if last:
            row = settings.row | dict(self.weights)
            save_with_settings(drawn.image, path, row, row)
        else:
            drawn.image.save(path)
        return path


def _progress(settings: Settings, stage: int, step: int) -> str:
    return f"Stage {stage + 1} of {len(settings.steps)}, step {step} of {settings.steps[stage]}"


def _caption(settings: Settings) -> str:
    loras = "".join(f", {name} {weight:g}" for name, weight in settings.loras.items())
    return f"{settings.prompt[:40]}, seed {settings.seed}{loras}"


def _remove(history: list[Drawn]) -> None:
    """Remove the files of images."""
    for drawn in history:
        for path in drawn.stages:
            path.unlink(missing_ok=True)
