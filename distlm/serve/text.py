"""Tokens to text as they come: whole characters only, and nothing that may turn out to begin a stop string."""

from collections.abc import Sequence
from typing import Any

CONTEXT_TOKENS = 5
"""Tokens of the prompt that are decoded along: some tokenizers write a token differently at the start of a text."""

HALF_PAIR = "the text holds half a surrogate pair, which is no character"


def has_half_pair(text: str) -> bool:
    """Whether a text holds half a surrogate pair, which JSON and a shell can carry and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


class TextStream:
    """Feed tokens, get text. What all calls return together is the text of all tokens, cut before the first stop string."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.stopped = False
        self._window = list(prompt[-CONTEXT_TOKENS:])      # decoded again at each step, so it is kept short
        self._old = len(self._window)                      # tokens of the window whose text has been passed on
        self._sent = len(self._decode().rstrip("\ufffd"))  # characters of the window's text that have been passed on
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain now."""
        self._window.append(token)
        text = self._decode()
        whole = text.rstrip("\ufffd")                      # the replacement character: bytes of a character that is not complete
        new = whole[self._sent:]
        self._sent = max(self._sent, len(whole))
        if len(whole) == len(text) and new:                # a clean cut: forget what lies before the last piece
            self._window = self._window[self._old:]
            self._old, self._sent = len(self._window), len(self._decode())
        return self._filter(new)

    def finish(self) -> str:
        """What was held back, where no stop string was met."""
        rest = self._filter(self._decode()[self._sent:])
        self._sent = len(self._decode())
        held, self._held = self._held, ""
        return rest if self.stopped else rest + held

    def _decode(self) -> str:
        return self.tokenizer.decode(self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _filter(self, new: str) -> str:
        if self.stopped or not self.stop:
            return "" if self.stopped else new
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[:min(found)]
        keep = max((n for stop in self.stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep:]
        return text[:len(text) - keep]
