"""The engine of a classifier: texts in, the probability of each of its labels out.

    classifier = TorchClassifier(folder)
    await classifier.classify([[1, 2, 3]])                 # [{"spam": 0.9, "ham": 0.1}]
"""

import asyncio
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from distlm.errors import out_of_memory
from distlm.model.build import check_servable, labels_of, load_model
from distlm.model.encoder import check_frame, is_encoder, read_frame, room
from distlm.model.reading import recorded_reading
from distlm.model.vocabulary import vocabulary_hash
from distlm.serve.engine import EngineFailed, EngineFull, NoMemory, NotFinite
from distlm.serve.metrics import Metrics
from distlm.serve.torch_engine import DTYPES, context_of

log = logging.getLogger(__name__)


class TorchClassifier:
    """A model that says which labels texts have. A thread of its own computes one request at a time; where more than `max_queued` would
    wait, they are refused. Raises InputError where the model cannot be loaded, or not be asked."""

    def __init__(self, folder: str | Path, *, dtype: str = "auto", device: str | None = None, threads: int | None = None,
                 max_sequences: int = 8, max_queued: int = 64, metrics: Metrics | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        kind = DTYPES[dtype] if dtype != "auto" else torch.float32 if self.device.type == "cpu" else torch.bfloat16
        model: Any = load_model(folder, f"model: {folder}", kind)
        self.model: Any = model.to(self.device).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        config = self.model.config
        check_servable(config, str(folder))
        self.frame = read_frame(Path(folder)) if is_encoder(config) else None
        if self.frame is not None:
            check_frame(config, self.frame, str(folder))
        self.before = self.frame.before if self.frame else ()
        self.context = context_of(config) if self.frame is None else room(config, self.frame)
        self.vocabulary = int(self.model.get_input_embeddings().num_embeddings)
        self.vocabulary_hash = vocabulary_hash(Path(folder))
        self.labels = labels_of(config)
        self.reading = recorded_reading(Path(folder))
        self.cut_tokens = self.reading.cut_tokens
        self.multiple = config.problem_type == "multi_label_classification"
        self.pad: int = config.get_text_config().pad_token_id
        self.metrics, self.max_sequences, self.max_queued = metrics or Metrics(), max_sequences, max_queued
        self._thread = ThreadPoolExecutor(1, "classifier", *((torch.set_num_threads, (threads,)) if threads else ()))
        self._counting, self._inside = threading.Lock(), 0
        self._error: EngineFailed | None = None

    def check(self) -> None:
        """Raises EngineFailed where the model has failed: after an error of a GPU nothing more is computed on it."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread; requests that wait fail."""
        self._error = self._error or EngineFailed("the engine has been closed")
        self._thread.shutdown()

    def encode(self, text: str) -> list[int]:
        """See `engine.Classifier`."""
        ids: list[int] = self.tokenizer(self.reading.cleaned(text), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    async def classify(self, texts: Sequence[Sequence[int]], activation: bool = True) -> list[dict[str, float]]:
        """See `engine.Classifier`."""
        with self._counting:
            self.check()
            if self._inside > self.max_queued:
                raise EngineFull(f"{self._inside} requests are here, which is the limit", remedy="try again later")
            self._inside += 1
            self.metrics.waiting.set(self._inside - 1)
        work = self._thread.submit(self._compute, texts, activation)
        work.add_done_callback(lambda _: self._leave())
        return await asyncio.wrap_future(work)

    def _leave(self) -> None:
        with self._counting:
            self._inside -= 1
            self.metrics.waiting.set(max(0, self._inside - 1))

    def _compute(self, texts: Sequence[Sequence[int]], activation: bool) -> list[dict[str, float]]:
        self.check()                                       # it may have failed while these waited
        try:
            with torch.inference_mode():
                return self._values(texts, activation)
        except NotFinite:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise NoMemory(f"there is no memory for {len(texts):,} texts", remedy="send fewer or shorter ones") from None
            log.exception("the engine has died")
            self._error = EngineFailed(f"the engine has died: {type(error).__name__}: {error}")
            raise self._error from error

    def _values(self, texts: Sequence[Sequence[int]], activation: bool) -> list[dict[str, float]]:
        """Texts of like length go through the model together, `max_sequences` at a time. Raises NotFinite."""
        found: list[dict[str, float]] = [{} for _ in texts]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for first in range(0, len(order), self.max_sequences):
            rows = order[first:first + self.max_sequences]
            longest = len(texts[rows[-1]])
            tokens = torch.full((len(rows), longest), self.pad, device=self.device)
            for row, i in enumerate(rows):
                tokens[row, :len(texts[i])] = torch.tensor(list(texts[i]), device=self.device)
            lengths = torch.tensor([len(texts[i]) for i in rows], device=self.device)
            inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": False} if self.frame is None else \
                self.frame.inputs(tokens, lengths, self.pad)
            logits = self.model(**inputs).logits.double()
            if not logits.isfinite().all():
                raise NotFinite("the classifier's logits are not finite",
                                remedy="its weights may be damaged, or too large for its dtype: try dtype: fp32")
            values = logits if not activation else logits.sigmoid() if self.multiple else logits.softmax(1)
            for i, value in zip(rows, values.tolist(), strict=True):
                found[i] = dict(zip(self.labels, value, strict=True))
            self.metrics.prompt_tokens.inc(sum(len(texts[i]) for i in rows))
            for _ in rows:
                self.metrics.finished("stop")
        return found
