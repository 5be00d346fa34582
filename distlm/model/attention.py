"""Causal self-attention for training on CPU: PyTorch's flash kernel forward, and a backward pass of large matrix products.

PyTorch's own backward kernel leaves a CPU's matrix units idle (docs/experiments.md).

    use_cpu_attention(model)        # a transformers model that would have used "sdpa"
"""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "distlm_cpu"
BLOCK_ELEMENTS = 1 << 20
"""Probabilities that are there at once: sequences, or else queries, are taken by as many as that."""


def use_cpu_attention(model: "PreTrainedModel") -> None:
    """Let the model attend with `causal_attention` where it would with PyTorch's kernel; another choice is left as it is."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
               dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **rest: Any) -> tuple[torch.Tensor, None]:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        taken = attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape == (
            len(query), 1, query.shape[2], query.shape[2]))                    # of documents, or of a sliding window
        if taken and causal and not dropout and query.shape[2] == key.shape[2] and query.shape[3] == value.shape[3]:
            groups = query.shape[1] // key.shape[1]
            if groups > 1:
                key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            out = causal_attention(query, key, value, query.shape[3] ** -0.5 if scaling is None else scaling, attention_mask)
            return out.transpose(1, 2).contiguous(), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **rest)

    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
                     mask: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(scale · QKᵀ + causal mask) V. All [batch, heads, tokens, width] of one float type, on the CPU; so is the result. mask:
    bool[batch, 1, tokens, tokens], in place of the causal one, whether a query (row) sees a key."""
    return _attend(query, key, value, scale, mask).transpose(1, 2)


@torch.library.custom_op("distlm::causal_attention", mutates_args=())
def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
    """[batch, tokens, heads, width]. An operator of PyTorch's, so that a compiled layer takes it as it is."""
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scale)
    return out.transpose(1, 2).contiguous()


@torch.library.custom_op("distlm::causal_attention_backward", mutates_args=())
def _attend_backward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, outer: torch.Tensor, scale: float,
                     mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value, [batch, tokens, heads, width]; `outer`: the output's gradient, in the same layout.

    Probabilities are computed again, in float32 as the kernel does, block by block: memory grows with the tokens, not with their square.
    Equations: FlashAttention, arXiv:2205.14135, appendix B.2."""
    batch, heads, length, width = query.shape
    sequences = max(1, BLOCK_ELEMENTS // (heads * length * length))
    gradients = [query.new_empty(batch, length, heads, width) for _ in range(3)]
    for start in range(0, batch, sequences):
        part = slice(start, start + sequences)
        flat = [one[part].reshape(-1, length, width) for one in (query, key, value, outer.transpose(1, 2))]
        for one, gradient in zip(gradients, _flat_backward(scale, None if mask is None else mask[part], *flat), strict=True):
            one[part] = gradient.view(-1, heads, length, width).transpose(1, 2)
    return gradients[0], gradients[1], gradients[2]


@_attend.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)


@_attend_backward.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, outer: torch.Tensor, scale: float,
      mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format) for _ in range(3))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:3], inputs[4])
    ctx.scale = inputs[3]


def _backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *kept, mask = ctx.saved_tensors
    dq, dk, dv = _attend_backward(*kept, outer, ctx.scale, mask)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), None, None


_attend.register_autograd(_backward, setup_context=_keep)


def _flat_backward(scale: float, seen_by: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                   outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, all [batch · heads, tokens, width], by blocks of queries. outer: the output's gradient.
    seen_by: bool[batch, 1, tokens, tokens], which keys a query sees; default: those up to its own."""
    length, dtype = query.shape[1], query.dtype
    rows = max(64, min(length, BLOCK_ELEMENTS // (len(query) * length)))
    precise_key = key.float().transpose(1, 2)
    dq, dk, dv = torch.empty_like(query), torch.zeros_like(key, dtype=torch.float32), torch.zeros_like(value, dtype=torch.float32)
    for start in range(0, length, rows):
        end = min(start + rows, length)
        part, seen = slice(start, end), slice(0, end if seen_by is None else length)
        if seen_by is None:
            mask = torch.full((end - start, end), -torch.inf).triu_(start + 1)
        else:
            mask = torch.zeros(len(seen_by), 1, end - start, length).masked_fill_(~seen_by[:, :, part], -torch.inf)
            mask = mask.expand(-1, len(query) // len(seen_by), -1, -1).reshape(len(query), end - start, length)
        scores = torch.baddbmm(mask, query[:, part].float(), precise_key[..., seen], alpha=scale)
        p = torch.softmax(scores, -1).to(dtype)
        dp = torch.bmm(outer[:, part], value[:, seen].transpose(1, 2))
        ds = torch._softmax_backward_data(dp, p, -1, dtype).mul_(scale)
        dq[:, part] = torch.bmm(ds, key[:, seen])
        dk[:, seen] += torch.bmm(ds.transpose(1, 2), query[:, part])
        dv[:, seen] += torch.bmm(p.transpose(1, 2), outer[:, part])
    return dq, dk, dv
