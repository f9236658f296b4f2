"""Float32Model: a model of diffusers whose weights stay float32 in a pipeline of half precision."""

from collections.abc import Callable
from typing import Any, Self

from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor


class Float32Model(ModelMixin):
    """A base of small models that must compute exactly: they move to a device, but never to half precision.

    That holds for ``to``, ``half`` and ``bfloat16``. A subclass names its weights in ``_keep_in_fp32_modules``, so that
    it also holds for ``from_pretrained``.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            lost = tensor.is_floating_point() and changed.element_size() < tensor.element_size()
            return tensor.to(changed.device) if lost else changed

        result: Any = super()._apply(keep_precision, recurse)
        return result
