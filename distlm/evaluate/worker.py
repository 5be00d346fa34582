"""A worker: a copy of the model, which scores the batches that it is given."""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distlm.errors import EvaluationError
from distlm.evaluate.labels import Observed, observed
from distlm.evaluate.task import Reader, Rows, Task
from distlm.train.totals import Sums, tally

Asked = tuple[list[int], int]
"""(tokens of a text, the place of the first whose probability is asked)"""
Said = tuple[float, bool]
"""(log-probability of these tokens in nats, whether each was the likeliest in its place)"""


@dataclass(frozen=True)
class Scores:
    """What a model says of the predictions of a batch that count, all [predictions], window by window."""

    logprobs: NDArray[np.float32]
    best: NDArray[np.int64]
    confidences: NDArray[np.float32]


class Worker:
    """See the module. `load` comes first, and again for each other model; Ray tells of what that raises, and not of what making the object
    does."""

    def __init__(self, task: Task, device: str, dtype: str, threads: int | None, log: Path | None = None) -> None:
        self.task, self.device, self.dtype, self.threads, self.log = task, device, dtype, threads, log

    def load(self, folder: Path) -> None:
        """Raises InputError where the model cannot be loaded, SpecError where it does not keep the documents of a window apart."""
        import torch

        from distlm.model.build import buffers, load_model, restore_buffers
        from distlm.model.documents import check_documents_apart
        from distlm.train.worker import log_to

        if self.log:
            log_to(self.log)
        self.reader, self.folder = Reader(self.task), folder
        if self.threads:
            torch.set_num_threads(self.threads)
        self.model: Any = load_model(self.folder, f"model: {self.folder}", torch.float32, exact=False).eval()
        if any(part.mask_documents for part in self.task.parts):
            check_documents_apart(self.model)
        if self.dtype == "bf16":
            kept = buffers(self.model)
            self.model = self.model.to(torch.bfloat16)
            restore_buffers(self.model, kept)
        self.model = self.model.to(self.device)

    def score(self, batch: int) -> Sums:
        """The sums of a batch. Raises EvaluationError where a loss is not finite."""
        import torch

        from distlm.model.loss import IGNORED, token_scores
        from distlm.train.batch import make_batch, send

        rows = self.reader.read(batch)
        given = make_batch(np.stack([rows.tokens, rows.marks], 1), rows.part.mask_documents)
        tokens, targets, positions = (send(one, torch.device(self.device)) for one in (given.tokens, given.targets, given.positions))
        assert tokens is not None
        with torch.inference_mode():
            found = token_scores(self.model, tokens, targets, positions)
            kept = targets != IGNORED
            return sums(self.task, rows, Scores(*(one[kept].cpu().numpy() for one in found)))

    def observe(self, batch: int) -> Observed:
        """What a classifier makes of a batch, filled up with its own padding. Raises EvaluationError where a logit is not finite."""
        import torch

        from distlm.model.build import give_padding
        from distlm.model.encoder import is_encoder, read_frame
        from distlm.model.loss import ClassifierLoss, trimmed

        documents, frame = self.reader.labelled(batch), None
        tokens, lengths = documents.tokens, torch.from_numpy(documents.lengths)
        if is_encoder(self.model.config):
            frame = read_frame(Path(documents.part.corpus) / "tokenizer")
        else:
            own = self.model.config.get_text_config().pad_token_id
            padding = documents.end if own is None else own
            give_padding(self.model.config, padding)
            tokens = np.where(np.arange(tokens.shape[1]) < documents.lengths[:, None], tokens, padding)
        module = ClassifierLoss(self.model, self.task.multiple_labels, None, frame).eval()
        given = trimmed(torch.from_numpy(tokens), lengths), torch.from_numpy(documents.labels), lengths
        with torch.inference_mode():
            module(*(one.to(self.device) for one in given))
        assert module.observed is not None
        return observed(documents, module.observed.cpu().numpy())

    def complete(self, prompts: list[list[int]], max_tokens: int) -> list[str]:
        """What the model adds to each prompt, taking the likeliest token each time."""
        from distlm.model.complete import complete

        return complete(self.model, tokenizer_of(self.folder), prompts, max_tokens)

    def continuations(self, asked: list[Asked]) -> list[Said]:
        """What the model says of each text of a batch, filled up at their ends. Raises EvaluationError where that is not finite."""
        import torch

        from distlm.model.loss import IGNORED, token_scores

        width = max(len(tokens) for tokens, _ in asked)
        given = torch.zeros(len(asked), width, dtype=torch.int64)
        targets = torch.full((len(asked), width - 1), IGNORED)
        for row, (tokens, first) in enumerate(asked):
            given[row, :len(tokens)] = torch.tensor(tokens)
            targets[row, first - 1:len(tokens) - 1] = torch.tensor(tokens[first:])
        with torch.inference_mode():
            found = token_scores(self.model, given.to(self.device), targets.to(self.device))
        logprobs, right = found.logprobs.cpu().double(), found.best.cpu() == targets
        return [said(logprobs[row, first - 1:len(tokens) - 1].tolist(), right[row, first - 1:len(tokens) - 1].tolist())
                for row, (tokens, first) in enumerate(asked)]

    def generations(self, prompts: list[list[int]], max_tokens: int, stops: list[str]) -> list[list[int]]:
        """The tokens that the model adds to each prompt of a batch, as evaluate.harness.Answering."""
        from distlm.model.complete import generate

        return generate(self.model, tokenizer_of(self.folder), prompts, max_tokens, stops)


@lru_cache(1)
def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def said(logprobs: list[float], right: list[bool]) -> Said:
    """Of a text's tokens. Raises EvaluationError where a log-probability is not finite."""
    if not np.isfinite(logprobs).all():
        raise EvaluationError("the model's log-probability of a text is not finite", cause="nonfinite_loss",
                              remedy="its weights may be damaged, or too large for its dtype: try dtype: fp32")
    return sum(logprobs), all(right)


def sums(task: Task, rows: Rows, scores: Scores) -> Sums:
    """The sums of a batch. Raises EvaluationError where a loss is not finite."""
    if not np.isfinite(scores.logprobs).all():
        raise EvaluationError(f"the model's loss is not finite in a window of {rows.part.name}", cause="nonfinite_loss",
                              remedy="its weights may be damaged, or too large for its dtype: try dtype: fp32")
    return tally(scores.logprobs, scores.best, scores.confidences, rows.tokens[:, 1:][rows.kept], rows.sizes[rows.kept],
                 rows.groups[rows.kept], task.groups, task.bins)


def default_threads(workers: int) -> int:
    """Threads of each of so many workers on a node."""
    return max(1, (os.cpu_count() or 1) // workers)
