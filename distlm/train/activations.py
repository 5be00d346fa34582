"""What autograd keeps of a sequence for the backward pass, by layer, counted on the meta device, where nothing is computed or allocated.

    kept = measure_activations(config, shape, "bf16", on_gpu=True).kept(every=0)           # bytes
"""

import contextlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distlm.model.adapter import add_adapter
from distlm.model.attention import KEPT_WIDTHS, causal_attention, keeps, kept_probabilities
from distlm.model.build import Shape, decoder_layers, skeleton
from distlm.model.tensor import divide
from distlm.spec.adapter import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps of one sequence."""

    layers: tuple[int, ...]
    """In each layer."""
    inputs: int
    """What goes into a layer, which is all that is kept of one that is computed again."""
    outside: int
    """Before, between and after layers, the loss not counted."""

    def kept(self, every: int) -> int:
        """With every n-th layer computed again, 0 for none (Chen et al. 2016)."""
        again = [i for i in range(len(self.layers)) if every and i % every == 0]
        return self.outside + sum(self.layers) + sum(self.inputs - self.layers[i] for i in again)


def measure_activations(config: "PreTrainedConfig", shape: Shape, precision: str, on_gpu: bool, masked: bool = False,
                        tensor: int = 1, adapter: Adapter | None = None, sequence: int = 1, packed: bool = False,
                        compiled: bool = False) -> Activations:
    """What autograd keeps of a sequence, counted in a forward pass.

    Attention is counted as it is done: on CPU `causal_attention` keeps queries, and keys and values repeated for each head, and of short
    sequences the probabilities; a GPU's fused kernel keeps the first three as they are. Where the family's code needs values, and so cannot
    run there, it is Korthikanti et al. 2022, equation 2, without the scores, which no fused kernel keeps: 34 bytes a token and unit of
    width, at two bytes a number. `sequence`: ranks that have a part of a sequence each, and in attention all tokens of a part of the heads.
    `packed`: as many tokens may stand in shorter rows, at most as long as keep the most probabilities. `compiled`: what torch.compile's
    partitioner would keep of a layer, which computes again what is cheap.
    """
    import torch

    text = config.get_text_config()
    p = 4 if precision == "fp32" else 2
    inputs = shape.context * text.hidden_size * p
    model: Any = divide(skeleton(config), tensor)
    if adapter:
        add_adapter(model, adapter, 0, compiled)
    model = model.to(torch.float32 if precision == "fp32" else torch.bfloat16).train()
    if model.config._attn_implementation == "sdpa":
        if compiled:
            _attend_with_gradient(model, on_gpu)
        else:
            _count_attention(model, on_gpu, sequence, packed)
    seen: dict[int, Any] = {storage._cdata: storage for parameter in model.parameters() for storage in (parameter.untyped_storage(),)}
    layers = decoder_layers(model)
    unlimited: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if compiled:
        _partition(layers)
        # past torch's limit, by default at the ninth count of a process, layers would be left as they are without a word
        unlimited = torch._dynamo.config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize)
    counts, current = [0] * (len(layers) + 1), [len(layers)]
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, i=i: current.__setitem__(0, i))
        layer.register_forward_hook(lambda *_: current.__setitem__(0, len(layers)))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage                 # kept, so that its address is not another's
            counts[current[0]] += storage.nbytes()
        return tensor

    mask = shape.context**2 * (1 + p) if masked else 0     # boolean, and as PyTorch adds it to the scores; one for all layers
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), unlimited:
            tokens = torch.zeros(1, shape.context, dtype=torch.int64, device="meta")
            mask_ = torch.ones_like(tokens)                # without one, transformers would look into the positions
            model.base_model(input_ids=tokens, attention_mask=mask_, use_cache=False)
        assert layers and all(counts[:-1])
    except Exception:                                      # a mixture of experts asks which tokens go where
        return Activations((shape.context * text.hidden_size * 17 * p,) * text.num_hidden_layers, inputs, inputs + mask)
    return Activations(tuple(counts[:-1]), inputs, counts[-1] + mask)


def _count_attention(model: Any, on_gpu: bool, sequence: int, packed: bool) -> None:
    """Let a model on the meta device keep what the fused kernels keep, without a mask."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            batch, heads, tokens, width = query.shape[0], query.shape[1] // sequence, query.shape[2] * sequence, query.shape[3]
            row = min(tokens, KEPT_WIDTHS * width)
            kept = kept_probabilities(row) * tokens // row
            probabilities = [query.new_empty(batch, heads, kept)] if not on_gpu and (packed or keeps(tokens, width)) else []
            ctx.save_for_backward(query, key, value, *probabilities)
            return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])

    def attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and not on_gpu:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return Kept.apply(query, key, value), None

    AttentionInterface.register("distlm_count", attend)
    AttentionMaskInterface.register("distlm_count", lambda *_, **__: None)
    model.set_attn_implementation("distlm_count")


def _attend_with_gradient(model: Any, on_gpu: bool) -> None:
    """Let a model on the meta device attend by operators whose gradients a partitioner sees, without a mask."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0] if on_gpu else \
            causal_attention(query, key, value, query.shape[3] ** -0.5)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("distlm_partition", attend)
    AttentionMaskInterface.register("distlm_partition", lambda *_, **__: None)
    model.set_attn_implementation("distlm_partition")


def _partition(layers: list[Any]) -> None:
    """Let layers keep what they would when they are compiled; nothing is."""
    import torch
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def as_it_is(graph: Any, _: Any) -> Any:
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=as_it_is, bw_compiler=as_it_is, partition_fn=min_cut_rematerialization_partition,
                           decompositions=select_decomp_table())
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=False)
