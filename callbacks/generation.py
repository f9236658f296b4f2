"""How the callbacks generate images of a model that is being trained, and what happens if that fails."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from time import perf_counter
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from nami_lightning.errors import first_line
from nami_lightning.pipelines.checks import NonFiniteImages
from nami_lightning.pipelines.sampler_settings import SamplerSettings
from nami_lightning.training.module import NamiModule

PATIENCE = timedelta(seconds=60)
"""How long a rank whose attempt failed waits for the others' to fail too."""

SHOWN = 3
"""Failed attempts that the error at the end names."""


class Attempts:
    """Lets a callback fail without ending the training: a warning at once, and an error when the training is saved.

    Args:
        callback: its name, for the messages.
    """

    def __init__(self, callback: str) -> None:
        self.callback = callback
        self.count = 0
        self.failures: list[str] = []
        self.without_result = 0

    @contextmanager
    def attempt(self, trainer: L.Trainer, module: NamiModule, together: bool = False) -> Iterator[None]:
        """Run what may fail in a ``with`` block; what it raises is a warning, and the training goes on.

        Not if memory ran out: then the next step would lack it too.

        Args:
            trainer: whose ranks take part.
            module: knows the step; the time counts as one of its pauses.
            together: the ranks need each other in the block. If it failed on some of them only, the others wait there
                for good, and the training can't go on.
        """
        begin = perf_counter()
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if together and not self._failed_on_all(trainer, module.step, error):
                raise
            self.failures.append(f"step {module.step}: {first_line(error)}")
            # Of each rank: one that failed alone says it in its own log.
            message = f"{self.callback} failed at {self.failures[-1]}. The training goes on."
            warnings.warn(message, stacklevel=3)
        finally:
            module.seconds_paused += perf_counter() - begin

    def _failed_on_all(self, trainer: L.Trainer, step: int, error: Exception) -> bool:
        """Tell whether all ranks failed at this attempt with the same kind of error.

        Without a collective: a rank that didn't fail may wait in another one.
        """
        if trainer.world_size == 1:
            return True
        store = dist.distributed_c10d._get_default_store()
        keys = [f"{self.callback}/{step}/{self.count}/{rank}" for rank in range(trainer.world_size)]
        store.set(keys[trainer.global_rank], type(error).__name__)
        try:
            store.wait(keys, PATIENCE)
        except RuntimeError:
            return False
        return len({store.get(key) for key in keys}) == 1

    def describe(self) -> str:
        """Return which attempts failed and why; empty if none did."""
        if not self.failures:
            return ""
        shown = "; ".join(self.failures[:SHOWN])
        more = f"; and {len(self.failures) - SHOWN} more" if len(self.failures) > SHOWN else ""
        every = f", at every attempt ({self.count})" if len(self.failures) >= self.count > 1 else ""
        return f"{self.callback} failed at {shown}{more}{every}"


def report_failures(trainer: L.Trainer, last: Attempts) -> None:
    """Tell at the end of a training what failed in it; all callbacks' failures are one error, raised by the last.

    Args:
        trainer: whose callbacks are asked.
        last: of the callback whose end this is.

    Raises:
        RuntimeError: attempts failed; it names the steps.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    asked = [
        one for one in (getattr(callback, "attempts", None) for callback in callbacks) if isinstance(one, Attempts)
    ]
    if last.without_result and last.without_result == last.count:
        warnings.warn(f"{last.callback} had no result at any of its {last.count} attempts, see above.", stacklevel=2)
    if asked and asked[-1] is not last:
        return
    failed = [text for text in (one.describe() for one in asked or [last]) if text]
    for one in asked:
        one.failures = []
    if failed:
        raise RuntimeError(f"the training is saved, but {'; '.join(failed)}")


def trainer_precision(module: NamiModule) -> AbstractContextManager[Any]:
    """Return a ``with`` block that computes as a step of training does: under autocast with ``bf16-mixed``."""
    trainer = module._trainer
    return nullcontext() if trainer is None else trainer.precision_plugin.forward_context()


def generate(
    module: NamiModule,
    sampler: SamplerSettings,
    prompts: list[str],
    seeds: Sequence[int],
    output_type: str = "pil",
    height: int | None = None,
    width: int | None = None,
) -> Any:
    """Generate an image of each prompt with the EMA's weights, if there are any, in the trainer's precision.

    Args:
        module: the model.
        sampler: how.
        prompts: one an image. They and the negative prompt are encoded by the module, which may remember encodings.
        seeds: of the images' noise, one an image.
        output_type: ``pil``, or another of diffusers'.
        height: of the images in px; None: as the settings say.
        width: of the images in px; likewise.

    Raises:
        NonFiniteImages: images that are NaN or infinite; the message names their prompts and seeds. All ranks have run
            the whole network by then.
    """
    arguments = sampler.arguments()
    negative_prompt = arguments.pop("negative_prompt", "")
    size = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
    try:
        states, negative = module.encode_prompts(prompts), module.encode_prompts([negative_prompt])
        with module.ema_weights, trainer_precision(module):
            output = module.pipeline()(
                prompt_embeds=states.sequence,
                pooled_prompt_embeds=states.pooled,
                negative_prompt_embeds=negative.sequence,
                negative_pooled_prompt_embeds=negative.pooled,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type=output_type,
                **(arguments | size),
            )
    except NonFiniteImages as error:
        raise NonFiniteImages(error.images, error.origins, prompts, seeds) from None
    return output.images
