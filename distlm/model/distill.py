"""Distillation (Hinton, Vinyals and Dean 2015, arXiv:1503.02531): a model learns what another one thinks of each token.

    loss = DistillationLoss(student, Teacher(teacher), temperature=2.0, alpha=0.5)
    loss(tokens)                                           # summed over the tokens; loss.sums has its two parts
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional

from distlm.model.attention import use_cpu_attention
from distlm.model.build import Shape, buffers, checkpoint_config, load_model, restore_buffers
from distlm.model.documents import check_documents_apart
from distlm.model.find import check_whole
from distlm.model.loss import (
    CHUNK_ELEMENTS,
    PLAIN_HEADS,
    CausalLoss,
    LossHead,
    cross_entropy,
    device_kind,
    linear_by_blocks,
    loss_inputs,
    scaled,
)
from distlm.model.masks import documents_known

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

KEY = "distill.teacher"


def teacher_config(source: str, shape: Shape) -> "PreTrainedConfig":
    """The configuration of the teacher in the folder `source`. Raises InputError for one that is not whole, or does not fit the corpus."""
    config = checkpoint_config(Path(source), shape, KEY)
    check_whole(Path(source), KEY)
    config.problem_type = None                             # a language model's
    return config


def load_teacher(source: str, shape: Shape, dtype: torch.dtype, masked: bool) -> "PreTrainedModel":
    """The teacher in the folder `source`, on the CPU. Where documents are `masked`, raises SpecError if it does not keep them apart."""
    model: Any = load_model(source, f"{KEY}: {source}", torch.float32, teacher_config(source, shape))
    if masked:
        check_documents_apart(model)
    kept = buffers(model)
    model.to(dtype)
    restore_buffers(model, kept)
    return cast("PreTrainedModel", model)


class Mix(NamedTuple):
    """What the loss of a token is made of."""

    temperature: float
    alpha: float
    """The weight of the teacher's part."""
    penalties: tuple[float, float] = (0.0, 0.0)
    """Label smoothing and z-loss of the cross-entropy, which are in its gradient alone."""


class SoftTargets(NamedTuple):
    """What a teacher makes of tokens, as far as it is there at once."""

    rows: torch.Tensor
    """[tokens, width], the last hidden states; or logits where there is no `weight`."""
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def logits(self, part: slice) -> torch.Tensor:
        """[tokens of the part, vocabulary]."""
        return self.rows[part] if self.weight is None else functional.linear(self.rows[part], self.weight, self.bias)


class Teacher:
    """A model that is asked and not trained. It is no module, so that it is none of the student's, which the engine divides and saves."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self._device: torch.device | None = None

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any], kept: torch.Tensor | None) -> SoftTargets:
        """`inputs` as the student gets them; `kept`: the rows of the flattened batch that give loss, None for all."""
        self._move(inputs["input_ids"].device)
        head = self.model.get_output_embeddings()
        if self.model.config.model_type in PLAIN_HEADS and isinstance(head, nn.Linear):
            rows, weight, bias = self.model.base_model(**inputs).last_hidden_state.flatten(0, 1), head.weight, head.bias
        else:
            rows, weight, bias = self.model(**inputs).logits.flatten(0, 1), None, None
        return SoftTargets(rows if kept is None else rows[kept], weight, bias)

    def _move(self, device: torch.device) -> None:
        if device == self._device:
            return
        self.model.to(device)
        if device.type == "cpu":
            use_cpu_attention(self.model)
        self._device = device


class DistillationLoss(CausalLoss):
    """Wraps a causal language model, the student; its forward pass is the mixed loss, and the plain cross-entropy while it does not train.
    The student's head is replaced where that saves the logits."""

    def __init__(self, model: "PreTrainedModel", teacher: Teacher, temperature: float, alpha: float, label_smoothing: float = 0.0,
                 z_loss: float = 0.0) -> None:
        super().__init__(model, label_smoothing, z_loss)
        self.teacher, self.mix = teacher, Mix(temperature, alpha, (label_smoothing, z_loss))
        if isinstance(head := model.get_output_embeddings(), LossHead):
            model.set_output_embeddings(StudentHead(head, self.mix))
        self.sums = torch.zeros(2)
        """Of the last pass of training: the cross-entropy, and KL(teacher || student) at the temperature, in nats, summed over tokens."""

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None, positions: torch.Tensor | None = None,
                kept: torch.Tensor | None = None, several: bool | None = None) -> torch.Tensor:
        """The sum over all predictions, a float32 scalar in nats, of

            (1 - alpha) -log p(token) + alpha temperature² KL(teacher || student)

        The divergence's gradient has a factor of 1 / temperature² (section 2), which is taken out so. Arguments are those of CausalLoss."""
        if not self.training:
            return super().forward(tokens, targets, positions, kept, several)
        inputs, wanted, kept = loss_inputs(tokens, targets, positions, kept)
        with documents_known(several if positions is not None else False):
            return self._mixed(inputs, wanted, kept)

    def _mixed(self, inputs: dict[str, Any], wanted: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        """The mixed loss; arguments are what `loss_inputs` returns."""
        soft = self.teacher(inputs, kept)
        head = self.model.get_output_embeddings()
        if isinstance(head, StudentHead):
            head.targets, head.kept, head.soft = wanted, kept, soft
            total: torch.Tensor = self.model(**inputs).logits
            self.sums = head.sums
            return total
        logits = self.model(**inputs).logits.flatten(0, 1)
        total, self.sums = linear_distillation(logits if kept is None else logits[kept], None, None, wanted, soft, self.mix)
        return total


class StudentHead(LossHead):
    """A LossHead that gives the mixed loss where it has soft targets."""

    def __init__(self, head: LossHead, mix: Mix) -> None:
        super().__init__(cast(nn.Linear, head), mix.penalties)             # all that counts are its parameters
        self.mix = mix
        self.soft: SoftTargets | None = None
        self.sums = torch.zeros(2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [batch, context, width]. Returns the loss of `targets`, a float32 scalar, or logits."""
        if self.soft is None:
            return super().forward(hidden)
        targets, kept, soft = self.targets, self.kept, self.soft
        self.targets = self.kept = self.soft = None
        assert targets is not None, "one set of targets for each pass"
        rows = hidden.flatten(0, 1)
        total, self.sums = linear_distillation(rows if kept is None else rows[kept], self.weight, self.bias, targets, soft, self.mix)
        return total


def linear_distillation(hidden: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, targets: torch.Tensor,
                        soft: SoftTargets, mix: Mix) -> tuple[torch.Tensor, torch.Tensor]:
    """The mixed loss, summed, a float32 scalar; and, without a gradient, float32[2]: the cross-entropy and the divergence.

    hidden: [rows, width], or logits where there is no `weight`; targets: int64[rows]; soft: of the same rows. By blocks of rows, with all
    gradients in the same pass: whole logits are never there, neither the student's nor the teacher's, where there are weights for them."""
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or (weight is not None and weight.requires_grad))
    total, sums = _LinearDistillation.apply(hidden, weight, bias, targets, soft, mix, wanted,
                                            wanted and weight is not None and weight.requires_grad)
    return total, sums


def _by_chunks(logits: torch.Tensor, taught: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor | None, mix: Mix) -> torch.Tensor:
    """float32[2]: the cross-entropy and the divergence, summed; the gradient of their mix goes to `gradient`, which may be `logits`.

    Equation 2 of the paper is the divergence's gradient by a logit, (q - p) / T, here times alpha T²."""
    temperature, alpha, penalties = mix
    rows = max(1, CHUNK_ELEMENTS[device_kind(logits)] // logits.shape[1])
    sums = torch.zeros(2, dtype=torch.float32, device=logits.device)
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        scores = logits[part].float()
        log_q = torch.log_softmax(scores / temperature, 1)
        log_p = torch.log_softmax(taught[part].float() / temperature, 1)
        hard, by_hard = cross_entropy(scores, targets[part, None], gradient is not None, penalties)
        sums += torch.stack([hard, functional.kl_div(log_q, log_p, reduction="sum", log_target=True)])
        if gradient is not None:
            assert by_hard is not None
            gradient[part] = by_hard.mul_(1 - alpha).add_(log_q.exp_() - log_p.exp_(), alpha=alpha * temperature)
    return sums


class _LinearDistillation(torch.autograd.Function):
    """The student's last linear layer and the loss, by `linear_by_blocks`, with the teacher's logits of each block beside."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, targets: torch.Tensor,
                soft: SoftTargets, mix: Mix, wanted: bool, trained: bool) -> tuple[torch.Tensor, torch.Tensor]:
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        ctx.save_for_backward(*linear_by_blocks(hidden, weight, bias, sums, wanted, trained, lambda part, logits, gradient: _by_chunks(
            logits, soft.logits(part), targets[part], gradient, mix)))
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(sums)
        return (1 - mix.alpha) * sums[0] + mix.alpha * mix.temperature**2 * sums[1], sums

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias = (None if one is None else scaled(one, outputs[0], ctx.dtype) for one in ctx.saved_tensors)
        return hidden, weight, bias, None, None, None, None, None
