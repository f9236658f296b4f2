"""``lightning serve``: a page in the browser to draw with a run's checkpoint or a saved pipeline."""

from argparse import Namespace
from typing import Any

from nami_lightning.cli.argument_types import add_checkpoint_options, add_device_options, positive_int

PORT = 7860


def add_command(commands: Any) -> None:
    """Add ``serve`` to the command line."""
    parser = commands.add_parser(
        "serve",
        help="draw on a page in the browser",
        description="Serve a page on this machine to draw with a NAMI: the stages appear one after another, steps and "
        "guidance are set by stage, LoRAs are switched on and off, and a click on an image brings its settings back. "
        "Only browsers on this machine reach it.",
    )
    parser.add_argument(
        "run", metavar="RUN", help="a run (its folder, or its name below runs/), or the folder of a saved pipeline"
    )
    parser.add_argument(
        "--lora",
        nargs="+",
        action="extend",
        default=[],
        metavar="FOLDER[:WEIGHT]",
        help="LoRAs to switch on and off on the page, and the weights they start with (default 1)",
    )
    parser.add_argument(
        "--port", type=positive_int, default=PORT, help=f"port of 127.0.0.1 to serve at (default {PORT})"
    )
    add_checkpoint_options(parser)
    add_device_options(parser)
    parser.set_defaults(execute=serve)


def serve(options: Namespace) -> None:
    """Serve the page until Ctrl+C.

    Raises:
        ValueError: the port is in use, the pipeline is not a NAMI's, or a LoRA is one of another model.
        ModuleNotFoundError: the extra ``serve`` is not installed.
    """
    import signal
    from threading import Event

    from nami_lightning.serving.server import check_port, import_gradio, serving

    check_port(options.port)
    import_gradio()
    from nami_lightning.pipelines.nami_pipeline import NamiPipeline
    from nami_lightning.runs.load import identify_weights, load_pipeline
    from nami_lightning.serving.drawing import Studio

    pipeline: Any = load_pipeline(options.run, options.dtype, options.step, options.ema is not False, options.device)
    if not isinstance(pipeline, NamiPipeline):
        raise ValueError(
            f"{options.run} is a {type(pipeline).__name__}; lightning serve takes only a NAMI. lightning convert makes "
            "one of a FLUX"
        )
    weights = {
        "model": options.run,
        "weights": identify_weights(options.run, options.step, options.ema is not False),
        "dtype": options.dtype,
    }
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as by Ctrl+C: the images are removed
    with serving(Studio(pipeline, options.lora), weights, options.port) as address:
        print(f"Serving {options.run} at {address} to this machine alone; Ctrl+C ends it", flush=True)
        try:
            Event().wait()
        except KeyboardInterrupt:
            print("Ended")
