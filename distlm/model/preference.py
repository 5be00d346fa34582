"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290): how likely two answers are, and the loss of their order.

    loss = PreferenceLoss(model, beta=0.1)
    loss.reference = Reference(keys, log_probs)            # of the model as it was at first
    loss(keys, *lay_out(tokens, targets, positions))       # equation 7, summed over the pairs
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from distlm.model.loss import BLOCK_ELEMENTS, CHUNK_ELEMENTS, PLAIN_HEADS, places_with_loss
from distlm.model.masks import documents_known, holds_several
from distlm.model.rows import pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Reference:
    """log p of both answers of every pair, by the model as it was at first."""

    keys: torch.Tensor
    """int64[pairs], ascending."""
    log_probs: torch.Tensor
    """float32[pairs, 2]: of the chosen answer and of the rejected one."""

    def of(self, keys: torch.Tensor) -> torch.Tensor:
        """float32[n, 2]; not a number for a key that is not known."""
        place = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return torch.where((self.keys[place] == keys)[:, None], self.log_probs[place], torch.nan)


class Laid(NamedTuple):
    """Pairs of answers as the model reads them."""

    tokens: torch.Tensor
    """int64[rows, width]."""
    positions: torch.Tensor
    """int64[rows, width], from 0 in each conversation, to which attention keeps."""
    kept: torch.Tensor
    """int64[n]: where in the flattened rows a token of an answer is predicted."""
    targets: torch.Tensor
    """int64[n]: those tokens."""
    answers: torch.Tensor
    """int64[n]: whose each is, 2 i for the chosen answer of pair i, 2 i + 1 for the rejected one."""
    lengths: torch.Tensor
    """int64[2 · pairs]: the tokens of each conversation that are read for that; what stands behind them changes nothing."""
    several: bool
    """Whether a row holds several conversations."""


def lay_out(tokens: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor, packed: bool = True) -> Laid:
    """Pairs as they stand in windows; `packed`: side by side, in as few rows as hold them, else as they come, with padding.

    tokens: int64[pairs, context + 1], both answers behind their prompts. targets: int64[pairs, context], IGNORED outside of the answers.
    positions: int64[pairs, context], from 0 in each conversation; what begins second is the rejected one. On the host: how rows are laid
    out depends on what they hold."""
    pairs, kept = len(tokens), places_with_loss(targets)
    owners = 2 * torch.arange(pairs)[:, None] + ((positions == 0).cumsum(1) > 1)
    wanted, of = targets.flatten()[kept], owners.flatten()[kept]
    lengths = targets.new_zeros(2 * pairs).scatter_reduce(0, of, positions.flatten()[kept] + 1, "amax")
    tokens = tokens[:, :-1]
    if packed:
        tokens, positions, kept = pack(tokens, positions, owners, kept, lengths)
    return Laid(tokens, positions, kept, wanted, of, lengths, holds_several(positions))


class PreferenceLoss(nn.Module):
    """Wraps a causal language model; its forward pass is the loss of pairs. The model's head is replaced where that saves the logits."""

    def __init__(self, model: "PreTrainedModel", beta: float, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.beta, self.label_smoothing = beta, label_smoothing
        if model.config.model_type in PLAIN_HEADS and isinstance(model.get_output_embeddings(), nn.Linear):
            model.set_output_embeddings(AnswerHead(model.get_output_embeddings()))
        self.model = model
        self.reference: Reference | None = None
        """None: the model is its own reference, so that nothing is won and the gradient is that of the first step."""
        self.sums = torch.zeros(3)
        """Of the last pass: the margins of the rewards summed up, how many are above 0, and the tokens of both answers that were read."""
        self.observed = torch.zeros(0, 4)
        """Of the last pass without training, float32[pairs, 4]: log p of the chosen and of the rejected answer, and their rewards."""

    def forward(self, keys: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, kept: torch.Tensor, targets: torch.Tensor,
                answers: torch.Tensor, lengths: torch.Tensor, several: bool) -> torch.Tensor:
        """The loss summed over the pairs, a float32 scalar in nats:

            -(1 - s) log sigmoid(margin) - s log sigmoid(-margin), margin = beta (log p/p_ref of the chosen - that of the rejected)

        keys: int64[pairs], by which the reference knows them; the others as `Laid` has them."""
        inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": False, "return_dict": True}
        with documents_known(several):
            each = self._of_each(inputs, kept, targets)
        log_probs = each.new_zeros(2 * len(keys)).index_add(0, answers, each).view(-1, 2)
        reference = log_probs.detach() if self.reference is None else self.reference.of(keys)
        rewards = self.beta * (log_probs - reference)
        margin = rewards[:, 0] - rewards[:, 1]
        with torch.no_grad():
            self.sums = torch.stack([margin.sum(), (margin > 0).sum(), lengths.sum()])
            if not self.training:
                self.observed = torch.cat([log_probs, rewards], 1)
        smoothing = self.label_smoothing
        return -((1 - smoothing) * functional.logsigmoid(margin) + smoothing * functional.logsigmoid(-margin)).sum()

    def _of_each(self, inputs: dict[str, Any], kept: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """float32[n]: log p of each target."""
        head = self.model.get_output_embeddings()
        if isinstance(head, AnswerHead):
            head.targets, head.kept = targets, kept
            found: torch.Tensor = self.model(**inputs).logits
            return found
        logits = self.model(**inputs).logits.flatten(0, 1)[kept]
        return functional.log_softmax(logits.float(), 1).gather(1, targets[:, None]).squeeze(1)


class AnswerHead(nn.Module):
    """Stands in the place of a model's last linear layer, with its parameters under their names, and gives log p of the targets; without
    targets, while it does not train, logits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.targets: torch.Tensor | None = None
        self.kept: torch.Tensor | None = None
        """The rows of the hidden states that `targets` are for."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [batch, context, width]. Returns log p of each target, float32[targets], or logits."""
        targets, kept, self.targets, self.kept = self.targets, self.kept, None, None
        if targets is None or kept is None:
            assert not self.training, "one set of targets for each pass"
            return functional.linear(hidden, self.weight, self.bias)
        return linear_log_probs(hidden.flatten(0, 1)[kept], self.weight, self.bias, targets)


def linear_log_probs(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
    """log softmax(hidden weightᵀ + bias)[target] of each row, float32[rows], by blocks of rows: whole logits are never there, neither for
    the values nor for the gradients, for which they are made once more. hidden: [rows, width]; weight: [vocabulary, width]."""
    log_probs: torch.Tensor = _LinearLogProbs.apply(hidden, weight, bias, targets)
    return log_probs


class _LinearLogProbs(torch.autograd.Function):
    """A row's gradient is multiplied by what the loss makes of its answer, which is known when all rows have been seen: so logits are
    computed twice."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
        sums = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        found = torch.empty_like(sums)
        for block in _parts(len(hidden), BLOCK_ELEMENTS, weight):
            logits = functional.linear(hidden[block], weight, bias)
            for part in _parts(len(logits), CHUNK_ELEMENTS, weight):
                scores = logits[part].float()
                here = slice(block.start + part.start, block.start + part.stop)
                sums[here] = torch.logsumexp(scores, 1)
                found[here] = scores.gather(1, targets[here, None]).squeeze(1)
        ctx.save_for_backward(hidden, weight, bias, targets, sums)
        return found - sums

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, sums = ctx.saved_tensors
        by_hidden = torch.empty_like(hidden)
        by_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        by_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
        for block in _parts(len(hidden), BLOCK_ELEMENTS, weight):
            logits = functional.linear(hidden[block], weight, bias)
            for part in _parts(len(logits), CHUNK_ELEMENTS, weight):
                here = slice(block.start + part.start, block.start + part.stop)
                by_row = outputs[0][here, None]
                p = torch.exp(logits[part].float() - sums[here, None]).mul_(-by_row)
                logits[part] = p.scatter_add_(1, targets[here, None], by_row)
            by_hidden[block] = logits @ weight             # the logits' gradient by now
            if by_weight is not None:
                by_weight += logits.T @ hidden[block]
            if by_bias is not None:
                by_bias += logits.sum(0, dtype=torch.float32)
        return (by_hidden, None if by_weight is None else by_weight.to(weight.dtype),
                None if bias is None or by_bias is None else by_bias.to(bias.dtype), None)


def _parts(rows: int, elements: dict[str, int], weight: torch.Tensor) -> list[slice]:
    """Slices of so many rows that their logits have about so many elements."""
    size = max(1, elements["cpu" if weight.device.type == "cpu" else "cuda"] // len(weight))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
