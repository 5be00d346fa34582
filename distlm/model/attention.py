"""Causal self-attention for training on CPU, made of large matrix products: PyTorch's flash kernel leaves a CPU's matrix units idle
(docs/experiments.md).

    use_cpu_attention(model)        # a transformers model that would have used "sdpa"
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "distlm_cpu"
BLOCK_QUERIES = 128
"""So many queries of a sequence are taken at once, with the keys up to the last of them: what lies beyond the diagonal is left out."""
BLOCK_ELEMENTS = 1 << 19
"""Probabilities in float32 that are there at once, of as many heads and sequences as that."""
KEPT_WIDTHS = 4
"""Tokens of a sequence, in widths of a head, whose probabilities take what query, key, value and output do."""


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
            out = causal_attention(query, key, value, query.shape[3] ** -0.5 if scaling is None else scaling, attention_mask,
                                   getattr(attention_mask, "ahead", None))
            return out.transpose(1, 2).contiguous(), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **rest)

    def make_mask(*given: Any, **named: Any) -> torch.Tensor | None:
        mask: Any = sdpa_mask(*given, **named)             # one for all layers of a kind
        if mask is not None:
            mask.ahead = looks_ahead(mask)                 # lost with a copy, for which each layer then looks
        return mask

    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, make_mask)
        model.set_attn_implementation(NAME)


def looks_ahead(mask: torch.Tensor) -> bool:
    """Whether some query sees a key that stands behind it."""
    return bool(mask.triu(1).any())


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
                     mask: torch.Tensor | None = None, ahead: bool | None = None) -> torch.Tensor:
    """softmax(scale · QKᵀ + causal mask) V. All [batch, heads, tokens, width] of one float type, float32 at most, on the CPU; so is the
    result. mask: bool[batch, 1, tokens, tokens], in place of the causal one, whether a query (row) sees a key; one that sees none has the
    mean of values. ahead: what `looks_ahead` says of the mask, where that is known."""
    learns = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    out, _ = _attend(*(one.reshape(-1, *one.shape[2:]) for one in (query, key, value)), scale, mask, learns and keeps(*query.shape[2:]),
                     ahead)
    return out.view(query.shape)


@torch.library.custom_op("distlm::causal_attention", mutates_args=())
def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None, keep: bool,
            ahead: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, [batch · heads, tokens, width] as the arguments are, and the probabilities where the backward pass is given them. An
    operator of PyTorch's, so that a compiled layer takes it as it is."""
    out, kept = torch.empty_like(query), _room(query, keep)
    for part, rows, seen in _blocks(query, mask, ahead):
        p = _probabilities(query, key, scale, mask, part, rows, seen)
        if len(kept):
            kept[part, rows, seen] = p
        out[part, rows] = torch.bmm(p, value[part, seen])
    return out, kept


@torch.library.custom_op("distlm::causal_attention_backward", mutates_args=())
def _attend_backward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: torch.Tensor, outer: torch.Tensor, scale: float,
                     mask: torch.Tensor | None, ahead: bool | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value; `outer`: the output's gradient; all [batch · heads, tokens, width].

    Equations: FlashAttention, arXiv:2205.14135, appendix B.2."""
    dq = torch.empty_like(query)
    dk, dv = (torch.zeros_like(one, dtype=torch.float32) for one in (key, value))
    for part, rows, seen in _blocks(query, mask, ahead):
        p = kept[part, rows, seen] if len(kept) else _probabilities(query, key, scale, mask, part, rows, seen)
        dp = torch.bmm(outer[part, rows], value[part, seen].transpose(1, 2))
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        dq[part, rows] = torch.bmm(ds, key[part, seen])
        dk[part, seen] += torch.bmm(ds.transpose(1, 2), query[part, rows])
        dv[part, seen] += torch.bmm(p.transpose(1, 2), outer[part, rows])
    return dq.mul_(scale), dk.mul_(scale).to(key.dtype), dv.to(value.dtype)


def keeps(tokens: int, width: int) -> bool:
    """Whether the probabilities of so many tokens are kept for the backward pass: where they take no more than query, key, value and output
    of that width do. Longer sequences have theirs computed again, so that memory grows with the tokens, not with their square."""
    return tokens <= KEPT_WIDTHS * width


def _room(query: torch.Tensor, keep: bool) -> torch.Tensor:
    """For probabilities, [batch · heads, tokens, tokens], or for none."""
    matrices, length, _ = query.shape
    return query.new_empty((matrices, length, length) if keep else (0, 0, 0))


def _blocks(query: torch.Tensor, mask: torch.Tensor | None, ahead: bool | None) -> Iterator[tuple[slice, slice, slice]]:
    """Which heads of which sequences, which queries, and the keys that those may see."""
    matrices, length, _ = query.shape
    if ahead is None:
        ahead = mask is not None and looks_ahead(mask)
    rows = min(BLOCK_QUERIES, length)
    size = max(1, BLOCK_ELEMENTS // (rows * length))
    for first in range(0, matrices, size):
        for start in range(0, length, rows):
            end = min(start + rows, length)
            yield slice(first, min(first + size, matrices)), slice(start, end), slice(0, length if ahead else end)


def _probabilities(query: torch.Tensor, key: torch.Tensor, scale: float, mask: torch.Tensor | None, part: slice, rows: slice,
                   seen: slice) -> torch.Tensor:
    """Of a block, in the type of the query; scores are products in float32, without which large ones are four times less exact."""
    scores = torch.bmm(query[part, rows].float() * scale, key[part, seen].float().transpose(1, 2))
    if mask is None:
        scores[..., rows] += torch.full((rows.stop - rows.start,) * 2, -torch.inf).triu_(1)
    else:
        sequences = torch.arange(part.start, part.stop) // (len(query) // len(mask))
        scores.masked_fill_(~mask[sequences, 0, rows, seen], torch.finfo(scores.dtype).min)      # no row is all -inf, which would be NaN
    return torch.softmax(scores, -1).to(query.dtype)


@_attend.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None, keep: bool,
      ahead: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), _room(query, keep)


@_attend_backward.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: torch.Tensor, outer: torch.Tensor, scale: float,
      mask: torch.Tensor | None, ahead: bool | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1], inputs[4])
    ctx.mark_non_differentiable(output[1])
    ctx.scale, ctx.ahead = inputs[3], inputs[6]


def _backward(ctx: Any, outer: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *kept, mask = ctx.saved_tensors
    return *_attend_backward(*kept, outer, ctx.scale, mask, ctx.ahead), None, None, None, None


_attend.register_autograd(_backward, setup_context=_keep)
