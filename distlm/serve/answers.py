"""The answers of the OpenAI API, from an engine's chunks: one writer for each kind of completion."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from distlm.serve.engine import Token


def error(message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of every error. It may quote the client, who may have sent half a surrogate pair."""
    texts = [None if text is None else text.encode(errors="backslashreplace").decode() for text in (message, param)]
    return {"error": {"message": texts[0], "type": kind, "param": texts[1], "code": code}}


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Completion:
    """Choices of /v1/completions: text."""

    whole = part = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, tokenizer: Any, as_ids: bool = False) -> None:
        self.model, self.tokenizer, self.as_ids = model, tokenizer, as_ids
        self._texts: dict[int, str] = {}
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self._offsets: dict[int, int] = {}

    def envelope(self, choices: list[dict[str, Any]], *, streaming: bool, usage: dict[str, int] | None = None) -> dict[str, Any]:
        return {"id": self.id, "object": self.part if streaming else self.whole, "created": self.created, "model": self.model,
                "choices": choices, **({"usage": usage} if usage else {})}

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of a choice before its first text."""
        return None

    def choice(self, index: int, text: str, tokens: Sequence[Token], reason: str | None, *, streaming: bool) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(index, tokens) if tokens else None, "finish_reason": reason}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(self.spell(token.id))
        name = "token_id:{}".format if self.as_ids else self.spell
        top = [{name(i): p for i, p in (*token.top, (token.id, token.logprob))} if token.top else None for token in tokens]
        return {"tokens": [name(token.id) for token in tokens], "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": top if any(top) else None, "text_offset": offsets}

    def spell(self, token: int) -> str:
        """A token's text; its name in the vocabulary where its bytes are no whole characters."""
        if token not in self._texts:
            text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
            self._texts[token] = str(self.tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text
        return self._texts[token]


class Chat(Completion):
    """Choices of /v1/chat/completions: messages."""

    whole, part, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, index: int) -> dict[str, Any]:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def choice(self, index: int, text: str, tokens: Sequence[Token], reason: str | None, *, streaming: bool) -> dict[str, Any]:
        logprobs = {"content": [self._entry(token) for token in tokens], "refusal": None} if tokens else None
        if streaming:
            return {"index": index, "delta": {"content": text} if text else {}, "logprobs": logprobs, "finish_reason": reason}
        return {"index": index, "message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": logprobs,
                "finish_reason": reason}

    def _entry(self, token: Token) -> dict[str, Any]:
        assert token.logprob is not None
        return {**self._spelled(token.id, token.logprob), "top_logprobs": [self._spelled(i, p) for i, p in token.top]}

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return {"token": self.spell(token), "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
