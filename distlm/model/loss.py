"""What a model is trained on: the cross-entropy of the next token, or of labels, summed, so that the caller divides by the global count
once; and what a model says of each token by itself."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from distlm.model.encoder import Frame
from distlm.model.masks import documents_known

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Logits that are in float32 at once: what a core's cache holds, or enough to fill a GPU."""
BLOCK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}
"""Logits that are there at once in the model's own precision: enough rows for a fast matrix product."""

TRIM_TOKENS = 16
"""Padding that no sequence of a classifier's micro-batch needs is cut off, down to a multiple of this."""
IGNORED = -100
"""A target that gives no loss, as transformers has it."""
PLAIN_HEADS = frozenset({"apertus", "arcee", "cwm", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4",
                         "flex_olmo", "gemma", "glm", "glm4", "glm4_moe", "gpt2", "gpt_neox", "gpt_oss", "helium", "hunyuan_v1_dense",
                         "hunyuan_v1_moe", "jais2", "llama", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral", "nemotron",
                         "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3",
                         "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2"})
"""Families whose logits are their last hidden states times one matrix, perhaps with a bias, and nothing after it. Others scale or cap them.
Of a mixture of experts the router's own loss is no part of the training loss, whatever the head."""


class CausalLoss(nn.Module):
    """Wraps a causal language model; its forward pass is the loss. The model's head is replaced where that saves the logits.

    Label smoothing and z-loss change the gradient alone: it is that of

        sum (1 - smoothing) -log p(token) + smoothing / V sum_j -log p(j) + z_loss log² Z

    and the value stays the plain cross-entropy, which can be compared."""

    def __init__(self, model: "PreTrainedModel", label_smoothing: float = 0.0, z_loss: float = 0.0) -> None:
        super().__init__()
        self.penalties = (label_smoothing, z_loss)
        self.observed: TokenScores | None = None
        """Of the last pass without training, [rows]: what the model says of each token that gives loss."""
        if model.config.model_type in PLAIN_HEADS and isinstance(model.get_output_embeddings(), nn.Linear):
            model.set_output_embeddings(LossHead(model.get_output_embeddings(), self.penalties))
        self.model = model

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None, positions: torch.Tensor | None = None,
                kept: torch.Tensor | None = None, several: bool | None = None) -> torch.Tensor:
        """The sum over all predictions of -log p(token), a float32 scalar in nats. tokens: int64[batch, context + 1].

        targets: int64[batch, context], IGNORED for a prediction that gives no loss; default: the tokens after the first, all of them.
        positions: int64[batch, context], from 0 in each document, to which attention keeps; default: the whole window is one.

        A GPU is waited for unless it is given what follows from these. kept: int64[rows], `places_with_loss`; targets are then int64[rows],
        those there. several: whether a window holds several documents."""
        inputs, targets, kept = loss_inputs(tokens, targets, positions, kept)
        self.observed = None if self.training else blank_scores(targets)
        head = self.model.get_output_embeddings()
        with documents_known(several if positions is not None else False):
            if not isinstance(head, LossHead):
                logits = self.model(**inputs).logits.flatten(0, 1)
                return summed_cross_entropy(logits if kept is None else logits[kept], targets, self.penalties, self.observed)
            head.targets, head.kept, head.told = targets, kept, self.observed
            return self.model(**inputs).logits


def places_with_loss(targets: torch.Tensor) -> torch.Tensor:
    """int64[rows]: where in the flattened batch the targets are that give loss. targets: int64[batch, context]."""
    return (targets.flatten() != IGNORED).nonzero().squeeze(1)


def loss_inputs(tokens: torch.Tensor, targets: torch.Tensor | None, positions: torch.Tensor | None, kept: torch.Tensor | None) \
        -> tuple[dict[str, Any], torch.Tensor, torch.Tensor | None]:
    """What a model is called with; the targets that give loss, int64[rows]; and which rows of the flattened batch those are, None for all.
    Arguments are those of `CausalLoss`."""
    inputs = {"input_ids": tokens[:, :-1], "use_cache": False, "return_dict": True,
              **({} if positions is None else {"position_ids": positions})}
    if targets is None:
        return inputs, tokens[:, 1:].flatten(), None
    if kept is None:
        kept = places_with_loss(targets)
        targets = targets.flatten()[kept]
    return inputs, targets, kept


class TokenScores(NamedTuple):
    """What a model says of each token that gives loss. All [rows] of those alone, or [batch, context], 0 where a target is IGNORED."""

    logprobs: torch.Tensor
    """float32: log p(target), in nats."""
    best: torch.Tensor
    """int64: the likeliest token, of equal ones the first."""
    confidences: torch.Tensor
    """float32: the probability of the likeliest token."""


def blank_scores(targets: torch.Tensor) -> TokenScores:
    """A place for what a model says of `targets`, int64[rows]."""
    logprobs, confidences = (torch.empty(len(targets), dtype=torch.float32, device=targets.device) for _ in range(2))
    return TokenScores(logprobs, torch.empty_like(targets), confidences)


def token_scores(model: "PreTrainedModel", tokens: torch.Tensor, targets: torch.Tensor | None = None,
                 positions: torch.Tensor | None = None) -> TokenScores:
    """What `model` says of each token, by chunks: whole float32 logits are never there, nor whole logits in the families of PLAIN_HEADS.
    Arguments are those of `CausalLoss`; the model's head may be one of its own or a LossHead. Gradients flow through `logprobs`."""
    targets = tokens[:, 1:] if targets is None else targets
    kept = targets != IGNORED
    inputs = {"input_ids": tokens[:, :-1], "use_cache": False, "return_dict": True,
              **({} if positions is None else {"position_ids": positions})}
    head: Any = model.get_output_embeddings()
    if model.config.model_type in PLAIN_HEADS and isinstance(head, nn.Linear | LossHead):
        rows, weight, bias = model.base_model(**inputs).last_hidden_state[kept], head.weight, head.bias
    else:
        rows, weight, bias = model(**inputs).logits[kept], None, None
    width = rows.shape[1] if weight is None else len(weight)
    size = max(1, BLOCK_ELEMENTS[device_kind(rows)] // width)
    parts = [(rows[i:i + size], targets[kept][i:i + size], weight, bias) for i in range(0, max(len(rows), 1), size)]
    again = torch.is_grad_enabled()                        # a block's logits are computed again for its gradient
    found = [checkpoint(_scores, *part, use_reentrant=False) if again else _scores(*part) for part in parts]
    logprobs, best, confidences = (torch.cat(each) for each in zip(*found, strict=True))
    blank = torch.zeros(targets.shape, dtype=torch.float32, device=rows.device)
    return TokenScores(blank.masked_scatter(kept, logprobs), blank.long().masked_scatter(kept, best),
                       blank.masked_scatter(kept, confidences))


def _scores(rows: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """(log p(target), the likeliest token, its probability) of hidden states, or of logits where there is no `weight`; all [rows]."""
    logits = (rows if weight is None else functional.linear(rows, weight, bias)).float()
    log_sum = logits.logsumexp(1)
    highest, best = logits.detach().max(1)
    return logits.gather(1, targets[:, None])[:, 0] - log_sum, best, (highest - log_sum.detach()).exp()


class LossHead(nn.Module):
    """Stands in the place of a model's last linear layer, with its parameters under their names, and gives the loss; without targets, while
    it does not train, logits."""

    def __init__(self, linear: nn.Linear, penalties: tuple[float, float] = (0.0, 0.0)) -> None:
        super().__init__()
        self.penalties = penalties
        self.weight, self.bias = linear.weight, linear.bias
        self.targets: torch.Tensor | None = None
        self.kept: torch.Tensor | None = None
        """The rows of the hidden states that `targets` are for; None for all."""
        self.told: TokenScores | None = None
        """Where what is said of each target goes; None where nobody asks."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [batch, context, width]. Returns the summed cross-entropy of `targets`, a float32 scalar, or logits."""
        targets, kept, told, self.targets, self.kept, self.told = self.targets, self.kept, self.told, None, None, None
        if targets is None:
            assert not self.training, "one set of targets for each pass"
            return functional.linear(hidden, self.weight, self.bias)
        wanted = torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad)
        rows = hidden.flatten(0, 1)
        return _LinearCrossEntropy.apply(rows if kept is None else rows[kept], self.weight, self.bias, targets, wanted,
                                         wanted and self.weight.requires_grad, self.penalties, told)


class ClassifierLoss(nn.Module):
    """Wraps a sequence classifier; its forward pass is the loss."""

    def __init__(self, model: "PreTrainedModel", multiple: bool, weights: torch.Tensor | None, frame: Frame | None = None) -> None:
        """`frame`: of an encoder, what stands around a text."""
        super().__init__()
        self.model, self.multiple, self.frame = model, multiple, frame
        self.weights = weights                             # no buffer, which the engine would round to bf16
        self.observed: torch.Tensor | None = None

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The sum over all sequences of weight x -log p(label), or of the mean over labels of the binary cross-entropy, a float32 scalar in
        nats. tokens: int64[batch, any], documents of which each stands at the beginning of a row, and has so many tokens there as lengths,
        int64[batch], say; behind them stands a causal model's padding. labels: as `LabelledBatch` has them."""
        inputs = {"input_ids": tokens, "use_cache": False} if self.frame is None else \
            self.frame.inputs(tokens, lengths, self.model.config.pad_token_id)
        with documents_known(False):
            logits = self.model(**inputs, return_dict=True).logits.float()
        if not self.training:
            self.observed = torch.cat([labels.float(), logits], 1)
        return label_loss(logits, labels, self.multiple, None if self.weights is None else self.weights.to(logits.device))


def trimmed(tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """As many tokens of each row as the longest has, rounded up, that there are few widths. tokens: int64[batch, context], lengths:
    int64[batch], on the host."""
    return tokens[:, :-(-int(lengths.amax()) // TRIM_TOKENS) * TRIM_TOKENS]


def label_loss(logits: torch.Tensor, labels: torch.Tensor, multiple: bool, weights: torch.Tensor | None = None) -> torch.Tensor:
    """A classifier's loss, summed over texts, a scalar in nats. logits: [texts, names], labels: as `LabelledBatch` has them."""
    if multiple:
        total = functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), pos_weight=weights, reduction="sum")
        return total / labels.shape[1]
    return functional.cross_entropy(logits, labels[:, 0], weight=weights, reduction="sum")


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, penalties: tuple[float, float] = (0.0, 0.0),
                         told: TokenScores | None = None) -> torch.Tensor:
    """Sum of -log softmax(logits)[target], computed in float32 by chunks of rows, the gradient in the same pass.

    logits: [rows, vocabulary] of any float type; targets: int64[rows]; penalties: label smoothing and z-loss, which are in the gradient
    alone; told: [rows], where what is said of each target goes. Returns a float32 scalar.
    """
    return _SummedCrossEntropy.apply(logits, targets, penalties, told)


def _by_chunks(logits: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor | None, penalties: tuple[float, float] = (0.0, 0.0),
               told: TokenScores | None = None) -> torch.Tensor:
    """The summed cross-entropy; its gradient, with that of the penalties, goes to `gradient`, which may be `logits`, and what is said of
    each target to `told`."""
    rows = max(1, CHUNK_ELEMENTS[device_kind(logits)] // logits.shape[1])
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        value, by_scores = cross_entropy(logits[part].float(), targets[part, None], gradient is not None, penalties, _part(told, part))
        total += value
        if gradient is not None and by_scores is not None:
            gradient[part] = by_scores
    return total


def _part(told: TokenScores | None, part: slice) -> TokenScores | None:
    """The place for some of the rows."""
    return None if told is None else TokenScores(*(one[part] for one in told))


def cross_entropy(scores: torch.Tensor, target: torch.Tensor, wanted: bool, penalties: tuple[float, float] = (0.0, 0.0),
                  told: TokenScores | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The summed cross-entropy of one chunk, and where it is `wanted` its gradient with that of the penalties. scores: float32[rows,
    vocabulary]; target: int64[rows, 1]; told: [rows], where what is said of each target goes."""
    smoothing, z_loss = penalties
    p = torch.softmax(scores, dim=1)
    surest = p.amax(1, keepdim=True)
    log_sum = scores.amax(1, keepdim=True) - surest.log()  # the largest p is never too small for a log
    nats = log_sum - scores.gather(1, target)
    total = nats.sum()
    if told is not None:
        torch.neg(nats[:, 0], out=told.logprobs)
        told.best.copy_(likeliest(scores))
        told.confidences.copy_(surest[:, 0])
    if not wanted:
        return total, None
    if z_loss:
        p *= 1 + 2 * z_loss * log_sum
    if smoothing:
        p -= smoothing / p.shape[1]
    return total, p.scatter_add_(1, target, torch.full_like(target, smoothing - 1, dtype=p.dtype))


def likeliest(scores: torch.Tensor) -> torch.Tensor:
    """int64[rows]: the place of the largest score of each row, of equal ones the first."""
    if scores.device.type == "cpu":                        # by vector instructions, which torch's own does without
        return torch.from_numpy(scores.detach().numpy().argmax(1))
    return scores.argmax(1)


def device_kind(tensor: torch.Tensor) -> str:
    """The key of CHUNK_ELEMENTS and BLOCK_ELEMENTS."""
    return "cpu" if tensor.device.type == "cpu" else "cuda"


def scaled(gradient: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale, a float32 scalar, is not rounded to the gradient's type first: it depends on the number of ranks and micro-batches."""
    return (gradient * scale).to(dtype)


def linear_by_blocks(hidden: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, sums: torch.Tensor, wanted: bool,
                     trained: bool, score: Callable[[slice, torch.Tensor, torch.Tensor | None], torch.Tensor]) \
        -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The last linear layer and a loss by blocks of rows, with all gradients in the same pass: whole logits are never there, in any
    precision. The idea is Liger Kernel's (arXiv:2410.10989, section 3.2).

    hidden: [rows, width], or logits where there is no `weight`. `score` is called with the rows of a block, its logits, and a place for
    their gradient, which may be theirs, or None; what it returns is added to `sums`. `wanted`: the gradients; `trained`: those of weight
    and bias too, in float32. Returns them by hidden, weight and bias."""
    rows = max(1, BLOCK_ELEMENTS[device_kind(hidden)] // (hidden.shape[1] if weight is None else len(weight)))
    by_hidden = torch.empty_like(hidden) if wanted else None
    by_weight = torch.zeros_like(weight, dtype=torch.float32) if trained and weight is not None else None
    by_bias = torch.zeros_like(bias, dtype=torch.float32) if trained and bias is not None else None
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        logits = hidden[part] if weight is None else functional.linear(hidden[part], weight, bias)
        gradient = None if by_hidden is None else by_hidden[part] if weight is None else logits
        sums += score(part, logits, gradient)
        if by_hidden is not None and weight is not None:
            by_hidden[part] = logits @ weight              # the logits' gradient by now
        if by_weight is not None:
            by_weight += logits.T @ hidden[part]
        if by_bias is not None:
            by_bias += logits.sum(0, dtype=torch.float32)
    return by_hidden, by_weight, by_bias


class _SummedCrossEntropy(torch.autograd.Function):
    """Whole float32 logits cost more time than the products around them: neither they nor their gradient are ever there."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, penalties: tuple[float, float],
                told: TokenScores | None) -> torch.Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(gradient)
        return _by_chunks(logits, targets, gradient, penalties, told)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return scaled(gradient, outputs[0], gradient.dtype), None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    """The last linear layer and the loss, by `linear_by_blocks`."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
                wanted: bool, trained: bool, penalties: tuple[float, float], told: TokenScores | None) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        ctx.save_for_backward(*linear_by_blocks(hidden, weight, bias, total, wanted, trained, lambda part, logits, gradient: _by_chunks(
            logits, targets[part], gradient, penalties, _part(told, part))))
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias = (None if one is None else scaled(one, outputs[0], ctx.dtype) for one in ctx.saved_tensors)
        return hidden, weight, bias, None, None, None, None, None
