"""Sequence parallelism: every sequence is divided over the ranks of a group (Jacobs et al. 2023, "DeepSpeed Ulysses", arXiv:2309.14509).

A rank computes with its part of the tokens. Attention alone looks at others: there the ranks exchange all tokens of all heads for all
tokens of some heads, and back. Weights are whole on every rank, so that for DeepSpeed each is a rank of data parallelism like any other.

    check_sequence(config, context=4096, degree=2)
    exchange_in_attention(model, sequence_group(2))        # positions must then say where in the sequence a rank's tokens stand
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from distlm.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo", "olmo2", "starcoder2", "gpt_neox", "gpt2", "phi3")
"""Those that take positions and look at other tokens in attention alone; a test has the gradients of each."""
NAME = "distlm_sequence"


def check_sequence(config: "PreTrainedConfig", context: int, degree: int, tensor: int = 1) -> None:
    """Raises SpecError for a model whose sequences of `context` tokens cannot be divided over `degree` ranks, each with the heads of one of
    `tensor` parts of the model."""
    where = "sharding.sequence_parallel"
    if config.model_type not in FAMILIES:
        raise SpecError(f"it is not known whether the {config.model_type} family looks at other tokens in attention alone", where=where,
                        remedy=f"leave it out, or take {', '.join(FAMILIES[:-1])} or {FAMILIES[-1]}")
    heads, part = config.num_attention_heads, f" of a part by tensor_parallel: {tensor}" if tensor > 1 else ""
    for what, count in (("tokens of context", context), (f"attention heads{part}", heads // tensor),
                        (f"key-value heads{part}", (getattr(config, "num_key_value_heads", None) or heads) // tensor)):
        if count % degree:
            near = [str(n) for n in range(1, min(count, 64) + 1) if count % n == 0]
            raise SpecError(f"{degree} does not divide the {count} {what}", where=where, remedy=f"try {', '.join(near)}")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < context:
        raise SpecError(f"a sliding window of {window} tokens is not kept where sequences are divided", where=where,
                        remedy="leave it out, or set sliding_window: null in model.config")
    if (config._attn_implementation_internal or "sdpa") != "sdpa":
        raise SpecError(f"{config._attn_implementation_internal} attention is not known to leave masks out", where=where,
                        remedy="take sdpa in model.config.attn_implementation")


def sequence_group(degree: int, tensor: int = 1) -> "distributed.ProcessGroup":
    """The ranks that divide sequences with this one: neighbours, or of neighbouring groups of `tensor` ranks those that hold the same part
    of the model. All ranks take part."""
    world = distributed.get_world_size()
    whole = degree * tensor
    groups = [[*range(first + part, first + whole, tensor)] for first in range(0, world, whole) for part in range(tensor)]
    return distributed.new_subgroups_by_enumeration(groups)[0]


def exchange_in_attention(model: "PreTrainedModel", group: "distributed.ProcessGroup", mask_documents: bool = False) -> None:
    """Let the model attend causally over the tokens of all ranks of `group`: to whole windows, or inside documents, whose first tokens have
    position 0."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    inner = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
    mask: list[torch.Tensor | None] = [None]               # of the forward pass that goes on

    def gather_mask(_: torch.nn.Module, __: Any, inputs: dict[str, Any]) -> None:
        whole: Any = document_mask(_gather(inputs["position_ids"], group))
        whole.ahead = False                                # which attention on CPU would look for
        mask[0] = whole

    def attend(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, *args: Any,
               **rest: Any) -> tuple[torch.Tensor, None]:
        query, key, value = (_Exchange.apply(one, 1, 2, group) for one in (query, key, value))
        out, _ = inner(module, query, key, value, mask[0], *args, **rest)
        return _Exchange.apply(out, 1, 2, group), None     # [batch, tokens, heads, width]: the other way round

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    model.set_attn_implementation(NAME)
    if mask_documents:
        model.register_forward_pre_hook(gather_mask, with_kwargs=True)


def document_mask(positions: torch.Tensor) -> torch.Tensor:
    """bool[batch, 1, tokens, tokens]: what each token looks at, itself and what stands before it in its document. positions: int64[batch,
    tokens], 0 where a document begins."""
    documents = (positions == 0).cumsum(1)
    return (documents[:, None, :, None] == documents[:, None, None, :]).tril()


def _gather(part: torch.Tensor, group: "distributed.ProcessGroup") -> torch.Tensor:
    """The parts of all ranks, side by side in dimension 1."""
    parts = [torch.empty_like(part) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, 1)


class _Exchange(torch.autograd.Function):
    """Rank i of n gives its i-th part in dimension `scatter` of everything, and gets everything in `gather`."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, scatter: int, gather: int, group: "distributed.ProcessGroup") -> torch.Tensor:
        ctx.scatter, ctx.gather, ctx.group = scatter, gather, group
        sent = torch.stack(whole.chunk(distributed.get_world_size(group), scatter))
        received = torch.empty_like(sent)
        distributed.all_to_all_single(received, sent, group=group)
        return torch.cat(received.unbind(), gather)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _Exchange.apply(outputs[0], ctx.gather, ctx.scatter, ctx.group), None, None, None
