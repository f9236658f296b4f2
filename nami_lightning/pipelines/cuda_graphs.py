"""CUDA graphs of a network's forward pass: for coarse stages, whose kernels run faster than Python starts them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nami_lightning.models.transformer import NamiTransformer2DModel

WARM_UP = 3
"""Calls before a graph is captured: libraries choose their kernels and take their memory in the first ones."""


class Graph(NamedTuple):
    """A captured forward pass, and the tensors that it reads and writes."""

    graph: Any
    inputs: tuple[Tensor, ...]
    output: Tensor


class CudaGraphs:
    """Replays a network's forward pass as a CUDA graph: one for each stage and shape, captured when it is first met.

    A graph starts all kernels of a pass at once. Use it as ``CudaGraphs(pipe.transformer)``, after the network is on
    its GPU in its dtype, with its LoRAs; :meth:`remove` takes it off. With other weights the same graphs run; another
    number of LoRAs, a step cache or offloading needs them captured anew. Each graph keeps the memory of its pass.

    Args:
        transformer: on a GPU; only for sampling, without gradients.

    Raises:
        ValueError: the network is not on a GPU.
    """

    def __init__(self, transformer: NamiTransformer2DModel) -> None:
        if transformer.device.type != "cuda":
            raise ValueError(f"CUDA graphs need a network on a GPU; this one is on {transformer.device}")
        self.transformer, self.eager = transformer, transformer.forward
        self.graphs: dict[tuple[Any, ...], Graph] = {}
        self.pool: Any = torch.cuda.graph_pool_handle()
        transformer.forward = self

    def remove(self) -> None:
        """Let the network run as it is written again."""
        del self.transformer.forward
        self.graphs.clear()

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        stage: int,
        joint_attention_kwargs: dict[str, Any] | None = None,
        **keywords: Any,
    ) -> Tensor:
        """Run the pass; see :meth:`NamiTransformer2DModel.forward`."""
        inputs = (hidden_states, encoder_hidden_states, pooled_projections, timestep)
        if torch.is_grad_enabled() or joint_attention_kwargs or keywords:
            output: Tensor = self.eager(*inputs, stage, joint_attention_kwargs, **keywords)
            return output
        key = (stage, *((tensor.shape, tensor.dtype) for tensor in inputs))
        if key not in self.graphs:
            self.graphs[key] = self._capture(inputs, stage)
        captured = self.graphs[key]
        for place, value in zip(captured.inputs, inputs, strict=True):
            place.copy_(value)
        captured.graph.replay()
        return captured.output.clone()

    def _capture(self, inputs: tuple[Tensor, ...], stage: int) -> Graph:
        places = tuple(tensor.clone() for tensor in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.eager(*places, stage)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            output = self.eager(*places, stage)
        return Graph(graph, places, output)
