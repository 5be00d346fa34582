"""What autograd keeps of a sequence for the backward pass, by layer, and what that pass takes beside it, counted on the meta device, where
nothing is computed or allocated.

    kept = measure_activations(config, shape, "bf16", on_gpu=True).kept(every=0)           # bytes
"""

import contextlib
import itertools
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distlm.model.adapter import add_adapter
from distlm.model.attention import KEPT_WIDTHS, causal_attention, keeps, kept_probabilities
from distlm.model.build import Shape, decoder_layers, skeleton
from distlm.model.encoder import is_encoder
from distlm.model.tensor import divide
from distlm.spec.adapter import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MANY_TENSORS = 500
"""That layers keep, on average, past which their backward pass is not counted, as it would take seconds: they go from token to token."""
BACKWARD = 2
"""What a layer takes on its way back over what it keeps, where that is not counted: so it is of Mamba's layers, where it is."""


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps of one sequence."""

    layers: tuple[int, ...]
    """In each layer."""
    inputs: int
    """What goes into a layer, which is all that is kept of one that is computed again."""
    outside: int
    """Before, between and after layers, the loss not counted."""
    backward: tuple[int, ...]
    """The most that there is at once as each layer is passed backward: what it keeps, until that has been used, and gradients of
    activations on the way. What other layers keep and the gradients of weights do not count."""
    mask: int = 0
    """Of `outside`, the mask of documents, which each layer uses and which is there until the first has been passed backward; where
    sequences are divided, until the next one is made."""

    def kept(self, every: int) -> int:
        """With every n-th layer computed again, 0 for none (Chen et al. 2016)."""
        again = [i for i in range(len(self.layers)) if every and i % every == 0]
        return self.outside + sum(self.layers) + sum(self.inputs - self.layers[i] for i in again)

    def last(self, every: int) -> int:
        """As the last layer is passed backward, when all others keep what they do. One that is computed again has its input beside that."""
        return self.kept(every) + self.backward[-1] - (0 if every and (len(self.layers) - 1) % every == 0 else self.layers[-1])

    def first(self) -> int:
        """As the first layer is passed backward, when others keep nothing any more."""
        return self.backward[0] + self.mask


def measure_activations(config: "PreTrainedConfig", shape: Shape, precision: str, on_gpu: bool, masked: bool = False,
                        tensor: int = 1, adapter: Adapter | None = None, sequence: int = 1, packed: bool = False,
                        compiled: bool = False) -> Activations:
    """What autograd keeps of a sequence, counted in a forward pass, and what there is at once in the backward pass after it.

    Attention is counted as it is done: on CPU `causal_attention` keeps queries, and keys and values repeated for each head, and of short
    sequences the probabilities; a GPU's fused kernel, and PyTorch's own of an encoder, keeps the first three as they are. Where the
    family's code needs values, and so cannot run there, it is Korthikanti et al. 2022, equation 2, without the scores, which no fused
    kernel keeps: 34 bytes a token and unit of width, at two bytes a number. Where only its backward pass cannot run there, or would take
    long, a layer takes `BACKWARD` times what it keeps on its way back. `sequence`: ranks that have a part of a sequence each, and in
    attention all tokens of a part of the heads, with the mask of all tokens. `masked`: documents are kept apart, by a boolean mask for all
    layers, of which PyTorch's kernels make one of the scores' precision in each layer and keep that; eager attention is given one of these
    for all layers. `packed`: as many tokens may stand in shorter rows, at most as long as keep the most probabilities. `compiled`: what
    torch.compile's partitioner would keep of a layer, which computes again what is cheap; gradients on the way back are taken for those of
    a layer that is not compiled, since between the same matrix products there are the same ones.
    """
    text = config.get_text_config()
    p = 4 if precision == "fp32" else 2
    inputs = shape.context * text.hidden_size * p
    model: Any = divide(skeleton(config), tensor)
    if adapter:
        add_adapter(model, adapter, 0, compiled)
    model = model.to(torch.float32 if precision == "fp32" else torch.bfloat16).train()
    if fused := model.config._attn_implementation == "sdpa":
        if compiled:
            _attend_with_gradient(model, on_gpu)
        else:
            _count_attention(model, on_gpu or is_encoder(config), sequence, packed)
    layers = decoder_layers(model)
    lives = _Lifetimes(model.parameters(), len(layers))
    unlimited: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if compiled:
        _partition(layers)
        # past torch's limit, by default at the ninth count of a process, layers would be left as they are without a word
        unlimited = torch._dynamo.config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize)
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, i=i: lives.enter(i))
        layer.register_forward_hook(lambda _, given, made, i=i: lives.leave(i, made if isinstance(made, torch.Tensor) else made[0]))

    seen = (shape.context * sequence)**2 if masked else 0
    mask, own = (seen, seen * p * on_gpu) if fused else (seen * p, 0)          # one for all layers, and one of each layer's
    hidden: Any = None
    with contextlib.suppress(Exception):                   # the family's own, of whatever kind: code that needs values
        with torch.autograd.graph.saved_tensors_hooks(lives.keep, lambda tensor: tensor), unlimited:
            tokens = torch.zeros(1, shape.context, dtype=torch.int64, device="meta")
            mask_ = torch.ones_like(tokens)                # without one, transformers would look into the positions
            hidden = model.base_model(input_ids=tokens, attention_mask=mask_, use_cache=False)[0]
    *counts, outside = lives.kept()
    if hidden is None or not counts or not all(counts):
        unit = shape.context * text.hidden_size * p        # on the way back: gradients of the output and of two that are four times as wide
        layers_ = text.num_hidden_layers
        return Activations((17 * unit + own,) * layers_, inputs, inputs + mask, ((17 + 9) * unit + own,) * layers_, mask)
    if compiled:
        plain = measure_activations(config, shape, precision, on_gpu, False, tensor, adapter, sequence)
        backward = [count + plain.backward[i] - plain.layers[i] for i, count in enumerate(counts)]
    else:
        backward = [BACKWARD * count for count in counts]
        if len(lives.numbers) <= MANY_TENSORS * len(layers):
            try:
                with lives:
                    hidden.sum().backward()                # whose gradient takes no memory
                backward = lives.most()
            except (AssertionError, KeyError):             # of the count itself
                raise
            except Exception:                              # the family's, as above
                pass
    return Activations(tuple(one + own for one in counts), inputs, outside + mask, tuple(one + own for one in backward), mask)


class _Lifetimes(TorchDispatchMode):
    """Which storages there are, from when a layer keeps one, or while this is entered an operator makes one, until it is freed."""

    def __init__(self, parameters: Iterator[torch.nn.Parameter], layers: int) -> None:
        super().__init__()
        self.layers = self.layer = layers                  # in which a pass is; their number stands for what is outside
        self.numbers, self.fresh = dict[int, int](), itertools.count()
        """Of the storages that there are, by address."""
        self.events: list[tuple[int, int, int, int | None]] = []
        """The layer that the pass is in, the storage's number, its bytes, negative where they are freed, and which layer keeps it."""
        self.sums: set[int] = set()
        """The numbers of weights' gradients."""
        for parameter in parameters:
            self.numbers[parameter.untyped_storage()._cdata] = next(self.fresh)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._forget)

    def enter(self, layer: int) -> None:
        self.layer = layer

    def leave(self, layer: int, hidden: torch.Tensor) -> None:
        """A layer has made `hidden`; the backward pass is in it from when it has the gradient of that."""
        self.layer = self.layers
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self.enter(layer))

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A layer keeps a tensor for the backward pass."""
        self._see(tensor.untyped_storage(), self.layer)
        return tensor

    def kept(self) -> list[int]:
        """Bytes that each layer keeps so far, and what is kept outside."""
        return [sum(size for _, _, size, owner in self.events if owner == layer) for layer in range(self.layers + 1)]

    def most(self) -> list[int]:
        """In the backward pass of each layer, of what others do not keep, weights' gradients left out."""
        found, there = [0] * (self.layers + 1), Counter[int | None]()
        for layer, number, size, owner in self.events:
            if number not in self.sums:
                there[owner] += size
                found[layer] = max(found[layer], there[None] + there[layer])
        return found[:-1]

    def __torch_dispatch__(self, operator: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        made = operator(*given, **(named or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage(), None)
        return made

    def _see(self, storage: Any, owner: int | None) -> None:
        address = storage._cdata
        if address in self.numbers:
            return
        number, size = next(self.fresh), storage.nbytes()
        self.numbers[address] = number
        self.events.append((self.layer, number, size, owner))

        def freed() -> None:
            del self.numbers[address]                      # which may be another's soon
            self.events.append((self.layer, number, -size, owner))

        weakref.finalize(storage, freed)

    def _forget(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.sums.add(self.numbers[parameter.grad.untyped_storage()._cdata])
        parameter.grad = None


def _count_attention(model: Any, on_gpu: bool, sequence: int, packed: bool) -> None:
    """Let a model on the meta device keep what the fused kernels keep, without a mask."""
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

        @staticmethod
        def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
            query, key, value, *_ = ctx.saved_tensors
            return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)

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
