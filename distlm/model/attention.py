"""Causal self-attention for training on CPU, made of large matrix products: PyTorch's flash kernel leaves a CPU's matrix units idle
(docs/experiments.md).

    use_cpu_attention(model)        # a transformers model that would have used "sdpa"
"""

import itertools
import math
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


@torch.library.custom_op("distlm::attend", mutates_args=())
def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None, keep: bool,
            ahead: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, [batch · heads, tokens, width] as the arguments are, and the probabilities where the backward pass is given them. An
    operator of PyTorch's, so that a compiled layer takes it as it is."""
    out, kept, whole = torch.empty_like(query), _room(query, keep, mask, ahead), _whole(mask, ahead)
    for part, rows, seen in _blocks(query, mask, ahead):
        p = torch.softmax(_scores(query, key, scale, mask, part, rows, seen), -1)
        p = _place(kept, query, part, rows, seen, whole).copy_(p) if len(kept) else p.to(query.dtype)
        out[part, rows] = torch.bmm(p, value[part, seen])
    return out, kept


@torch.library.custom_op("distlm::attend_backward", mutates_args=())
def _attend_backward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: torch.Tensor, outer: torch.Tensor, scale: float,
                     mask: torch.Tensor | None, ahead: bool | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value; `outer`: the output's gradient; all [batch · heads, tokens, width].

    Equations: FlashAttention, arXiv:2205.14135, appendix B.2."""
    dq, dk, dv = (torch.empty_like(one) for one in (query, key, value))
    for part, blocks in itertools.groupby(_blocks(query, mask, ahead), lambda block: block[0]):
        by_key, by_value = (torch.zeros_like(one[part], dtype=torch.float32) for one in (key, value))
        for _, rows, seen in blocks:
            if len(kept):
                p = _place(kept, query, part, rows, seen, _whole(mask, ahead))
            else:
                p = torch.softmax(_scores(query, key, scale, mask, part, rows, seen), -1).to(query.dtype)
            by_row, asked = outer[part, rows], query[part, rows]
            ds = torch._softmax_backward_data(torch.bmm(by_row, value[part, seen].transpose(1, 2)), p, -1, p.dtype)
            dq[part, rows] = torch.bmm(ds, key[part, seen]).mul_(scale)
            by_key[:, seen].add_(torch.bmm(ds.transpose(1, 2), asked))
            by_value[:, seen].add_(torch.bmm(p.transpose(1, 2), by_row))
        dk[part], dv[part] = by_key.mul_(scale), by_value
    return dq, dk, dv


def keeps(tokens: int, width: int) -> bool:
    """Whether the probabilities of so many tokens are kept for the backward pass: where they take no more than query, key, value and output
    of that width do. Longer sequences have theirs computed again, so that memory grows with the tokens, not with their square."""
    return tokens <= KEPT_WIDTHS * width


def num_products(tokens: int, matrices: int) -> int:
    """Shapes that products of probabilities have, both ways, for sequences of so many tokens: with values, with them on the way back, and
    transposed, for each number of keys that a block of queries sees; twice as many where the last of `matrices`, of all heads and
    sequences, are fewer than are taken at once."""
    size = _at_once(tokens)
    return 3 * -(-tokens // BLOCK_QUERIES) * ((matrices >= size) + (matrices % size > 0))


def _at_once(tokens: int) -> int:
    """Heads and sequences of a block."""
    return max(1, BLOCK_ELEMENTS // (min(BLOCK_QUERIES, tokens) * tokens))


def _whole(mask: torch.Tensor | None, ahead: bool | None) -> bool:
    """Whether there is room for what lies beyond the diagonal: unless it is known to be left out."""
    return mask is not None and ahead is not False


def _room(query: torch.Tensor, keep: bool, mask: torch.Tensor | None, ahead: bool | None) -> torch.Tensor:
    """For the probabilities of all blocks of queries, one after the other, or for none."""
    matrices, length, _ = query.shape
    return query.new_empty(matrices * _before(length, length, _whole(mask, ahead)) if keep else 0)


def kept_probabilities(tokens: int) -> int:
    """How many are kept of a head and a sequence of so many tokens, which do not look ahead."""
    return _before(tokens, tokens, whole=False)


def _before(row: int, length: int, whole: bool) -> int:
    """Room of one matrix for the blocks that come before the one which begins with query `row`."""
    ends = [min(start + BLOCK_QUERIES, length) for start in range(0, row, BLOCK_QUERIES)]
    return sum((end - start) * (length if whole else end) for start, end in itertools.pairwise([0, *ends]))


def _place(kept: torch.Tensor, query: torch.Tensor, part: slice, rows: slice, seen: slice, whole: bool) -> torch.Tensor:
    """Of a block's probabilities, [matrices of the part, queries, keys], dense."""
    matrices, length, _ = query.shape
    size, start = (matrices, rows.stop - rows.start, seen.stop), matrices * _before(rows.start, length, whole)
    return kept[start:start + math.prod(size)].view(size)[part]


def _blocks(query: torch.Tensor, mask: torch.Tensor | None, ahead: bool | None) -> Iterator[tuple[slice, slice, slice]]:
    """Which heads of which sequences, which queries, and the keys that those may see."""
    if ahead is None:
        ahead = mask is not None and looks_ahead(mask)
    matrices, length, _ = query.shape
    rows, size = min(BLOCK_QUERIES, length), _at_once(length)
    for first in range(0, matrices, size):
        for start in range(0, length, rows):
            end = min(start + rows, length)
            yield slice(first, min(first + size, matrices)), slice(start, end), slice(0, length if ahead else end)


def _scores(query: torch.Tensor, key: torch.Tensor, scale: float, mask: torch.Tensor | None, part: slice, rows: slice,
            seen: slice) -> torch.Tensor:
    """Of a block, by products in float32, without which large ones are four times less exact. Where a query does not see a key: -inf, or
    under a mask the least number, which is added, as filling it in takes longer (docs/experiments.md)."""
    scores = torch.bmm(query[part, rows].float() * scale, key[part, seen].float().transpose(1, 2))
    if mask is None:
        scores[..., rows].add_(torch.full((rows.stop - rows.start,) * 2, -torch.inf).triu_(1))
    else:
        heads = len(query) // len(mask)
        first, last = part.start // heads, (part.stop - 1) // heads
        hidden = (mask[first:last + 1, 0, rows, seen].to(scores.dtype) - 1) * torch.finfo(scores.dtype).max      # in which a score is lost:
        scores.add_(hidden[torch.arange(part.start, part.stop) // heads - first])                  # none is -inf, of which a row gives NaN
    return scores


@_attend.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None, keep: bool,
      ahead: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), _room(query, keep, mask, ahead)


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
