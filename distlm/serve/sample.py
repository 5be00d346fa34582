"""From logits to tokens: the rows of a batch each with their own temperature, top_p and random source."""

import random
from collections.abc import Sequence

import torch

from distlm.serve.engine import Request, Token

CHUNK_ELEMENTS = 1 << 23
"""Log-probabilities that are there at once: those of a long prompt would be many times its logits in bfloat16."""
IMPOSSIBLE = -9999.0
"""The log-probability of what cannot be, as OpenAI and vLLM write it: JSON has no infinity."""


def choose(logits: torch.Tensor, requests: Sequence[Request], sources: Sequence[random.Random]) -> list[int]:
    """The next token of every row of logits [rows, vocabulary]. A row's draw depends on its own source alone, not on its company."""
    chosen = logits.argmax(-1)
    drawn = [i for i, request in enumerate(requests) if request.temperature > 0]
    if drawn:
        device = logits.device
        temperature = torch.tensor([max(requests[i].temperature, 1e-6) for i in drawn], device=device)
        top_p = torch.tensor([requests[i].top_p for i in drawn], device=device)
        uniform = torch.tensor([sources[i].random() for i in drawn], device=device)
        # scaled from the row's maximum, so that a tiny temperature does not overflow
        rows = logits[drawn].float()
        rows = (rows - rows.amax(-1, keepdim=True)) / temperature[:, None]
        probabilities, order = rows.softmax(-1).sort(descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        # nucleus sampling (Holtzman et al. 2020): the smallest set of likeliest tokens that reaches top_p
        probabilities = probabilities.masked_fill((before >= top_p[:, None]) & (top_p[:, None] < 1), 0)
        if (top_p == 0).any():
            probabilities[top_p == 0, 0] = 1
        cumulative = probabilities.double().cumsum(-1)
        place = torch.searchsorted(cumulative, uniform[:, None].double() * cumulative[:, -1:], right=True)
        last = ((probabilities > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
        chosen[drawn] = order.gather(-1, place.minimum(last))[:, 0]
    return chosen.tolist()


def score(logits: torch.Tensor, ids: Sequence[int], num_top: int) -> list[Token]:
    """The log-probabilities of `ids` under logits [len(ids), vocabulary], and the `num_top` likeliest at each place."""
    found, size = list[Token](), max(1, CHUNK_ELEMENTS // logits.shape[1])
    for first in range(0, len(ids), size):
        found += _score(logits[first:first + size], ids[first:first + size], num_top)
    return found


def _score(logits: torch.Tensor, ids: Sequence[int], num_top: int) -> list[Token]:
    logprobs = logits.float().log_softmax(-1).nan_to_num(nan=IMPOSSIBLE, neginf=IMPOSSIBLE)
    own = logprobs.gather(-1, torch.tensor(list(ids), device=logits.device)[:, None])[:, 0].tolist()
    if not num_top:
        return [Token(token, value, ()) for token, value in zip(ids, own, strict=True)]
    # by the logits: of two that are nearly equal, the log-probabilities may be equal
    places = logits.argmax(-1, keepdim=True) if num_top == 1 else logits.topk(num_top).indices
    return [Token(token, value, tuple(zip(place, best, strict=True)))
            for token, value, place, best in zip(ids, own, places.tolist(), logprobs.gather(-1, places).tolist(), strict=True)]
