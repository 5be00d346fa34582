"""Conversations to tokens, by the tokenizer's chat template, and which of the tokens give loss.

    template = read_template(folder, "<|endoftext|>", "assistant", "tokenizer")
    template.encode([("user", "Why?"), ("assistant", "So.")])          # (tokens, loss), or raises Refused

What the template writes is encoded with its special tokens; what a turn says is encoded by itself and as text, so that a user who
writes `<|assistant|>` says these characters and does not open an answer. Which is which is known by rendering the conversation once
more with marks around each content: without the marks it must be the same, and every turn must be in it once, or the conversation is
refused.

An answer gives loss with the token that ends it: what the template writes behind every answer, up to its first special token. A
template that tells with `{% generation %}` what the model says is taken at its word. An empty answer gives none: it would teach to end
at once.
"""

import contextlib
import itertools
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from distlm.corpus.conversations import ANSWERS, SYSTEM, USER, Refused, Turns, is_empty_answer
from distlm.corpus.plain import plain, respelled, without_special
from distlm.errors import InputError
from distlm.spec.prepare import GENERATION

MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Characters that Unicode keeps out of text."""
NO_CLOCK = "{% set strftime_now = no_clock %}"
"""Some templates write the date of the day, and have another one for where there is no clock: tokens must not depend on the day."""
QUESTION = [(USER, "What is the first question?"), (ANSWERS, "It has this answer.")]
PROBES = (QUESTION, [(SYSTEM, "Answer all questions."), *QUESTION])


@dataclass(frozen=True)
class Piece:
    """A part of a rendered conversation that is encoded by itself."""

    text: str
    content: bool
    """Whether a turn says it."""
    loss: bool


class Template:
    """A chat template with its tokenizer. Raises InputError, naming `where`, for one that cannot be used."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, source: str, special: dict[str, Any], eos: str, loss: str, where: str) -> None:
        self._source, self._special, self._loss = NO_CLOCK + source, special, loss
        self._by_generation = bool(GENERATION.search(source))
        self._markup = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        self._markup.no_truncation()
        self._markup.no_padding()
        self._text = plain(tokenizer, eos)
        self._spelled = respelled(self._text, eos, where)
        self._eos: int = self._markup.get_vocab(with_added_tokens=True)[eos]
        self._markup_ids = lru_cache(10_000)(lambda text: self._markup.encode(text, add_special_tokens=False).ids)
        self._names = [token.content for token in self._markup.get_added_tokens_decoder().values() if token.special]
        self._end, self._ended = "", self._by_generation
        self.end_id: int | None = None
        """The special token that ends every answer and gives loss with it; None where a text or nothing does."""
        self.note = ""
        """What stands before every answer in training and not behind a question that is asked, in words; "" where nothing does."""
        try:
            self._probe(where)
        except Refused as refused:
            raise InputError(f"the chat template cannot write a question and its answer: {refused.reason}: {refused.detail}", where=where,
                             remedy="give a template that does") from None

    def _probe(self, where: str) -> None:
        for turns in PROBES:
            try:
                alone, spans = self._render(turns)
                break
            except Refused:
                if turns is PROBES[-1]:
                    raise
        answer = turns[-1][1]
        behind = (alone[:spans[-1][1]] if spans else alone).partition(answer)[2]
        if not self._by_generation:
            with contextlib.suppress(Refused):             # of a template for one question
                more = self._render([*turns, *QUESTION])[0].partition(answer)[2]
                behind = behind[:_num_alike(behind, more)]
        first = re.search("|".join(map(re.escape, sorted(self._names, key=len, reverse=True))) or "(?!)", behind)
        if not self._by_generation:
            self._end, self._ended = behind[:first.end()] if first else behind.rstrip(), bool(first)
        self.end_id = self._markup.token_to_id(first[0]) if first else None
        tokens, loss = self.encode(turns)
        text = self._markup.decode(tokens, skip_special_tokens=False)
        if not text.startswith(alone):
            begin = max(0, _num_alike(text, alone) - 20)
            spaces = text.replace(" ", "").startswith(alone.replace(" ", ""))
            raise InputError(f"the tokenizer {'puts spaces before or into' if spaces else 'changes'} the parts of a conversation: "
                             f"{alone[begin:begin + 60]!r} becomes {text[begin:begin + 60]!r}", where=where,
                             remedy="name a tokenizer that gives text back as it was, "
                             f"{'such as one with add_prefix_space: false' if spaces else 'with no normalizer'}; no template mends that")
        if not any(loss[1:]):
            raise Refused("no_loss", "no token of the answer gives loss")
        begin = min([alone.index(answer), *(start for start, _ in spans)])
        self.note = self._lacks(self._render(turns[:-1], ask=True)[0], self._render(turns[:-1])[0], alone[:begin], where)

    def _lacks(self, asked: str, bare: str, trained: str, where: str) -> str:
        """What a question lacks as it is `asked`, in words, beside what stands before an answer that is `trained` on; `bare`: the question
        without a generation prompt. Raises InputError where it has something else there, or nothing of what begins an answer."""
        if not trained.startswith(asked):
            same = _num_alike(trained, asked)
            raise InputError(f"under add_generation_prompt the chat template ends a question with {asked[same:]!r}, and in training "
                             f"{trained[same:]!r} stands there before an answer", where=where,
                             remedy="write the same at both places, in a tokenizer.chat_template")
        lost = trained[len(asked):]
        if lost.strip() and asked == bare:
            raise InputError(f"the chat template writes {lost!r} before an answer, and nothing under add_generation_prompt, so that an "
                             "endpoint would ask without it", where=where, remedy="give a tokenizer.chat_template that ends with "
                             f"{{% if add_generation_prompt %}}{{{{ {lost!r} }}}}{{% endif %}}")
        if not lost.strip() or self._loss == "all":
            return ""
        return (f"the chat template writes {lost!r} before every answer, and not behind a question that is asked: an endpoint leaves that "
                "to the model, which is not trained to write it")

    def encode(self, turns: Turns, first: int = 0) -> tuple[list[int], list[bool]]:
        """(tokens with the end token, whether each gives loss), which turns before the `first` do not. Raises Refused."""
        answers = [turn for turn in turns if turn[0] == ANSWERS]
        if answers and all(is_empty_answer(*turn) for turn in answers):
            raise Refused("empty_answer", f"{len(answers):,} answers say nothing" if answers[1:] else "the answer says nothing")
        pieces = self.pieces(turns, first)
        said = iter(self._text.encode_batch_fast([piece.text for piece in pieces if piece.content], add_special_tokens=False))
        tokens, loss = list[int](), list[bool]()
        for piece in pieces:
            ids = without_special(next(said).ids, self._spelled) if piece.content else self._markup_ids(piece.text)
            tokens += ids
            loss += [piece.loss] * len(ids)
        if tokens[-1:] != [self._eos]:
            tokens.append(self._eos)                       # every document has its end token; here it ends an answer that nothing else ends
            loss.append(self._loss == "all" or (not self._ended and turns[-1][0] == ANSWERS and not is_empty_answer(*turns[-1])))
        if not any(loss[1:]):
            raise Refused("no_loss", f"no token of {', '.join(role for role, _ in turns)} gives loss"[:200])
        return tokens, loss

    def pieces(self, turns: Turns, first: int = 0) -> list[Piece]:
        """The conversation as the template writes it, in parts. Raises Refused."""
        plain = self._render(turns)[0]
        mark = next((mark for mark in MARKS if mark not in plain), None)
        if mark is None:
            raise Refused("template_changes_text", "the text has every character that would mark its parts")
        for strip in (str, str.strip):                     # many templates take white space off the ends
            text, spans = self._render([(role, f"{mark}{i}{mark}{strip(content)}{mark}") for i, (role, content) in enumerate(turns)])
            parts = text.split(mark)                       # template, number, content, template, number, content, ..., template
            if "".join(part for i, part in enumerate(parts) if i % 3 != 1) == plain and \
                    sorted(parts[1::3]) == sorted(map(str, range(len(turns)))):
                return self._cut(turns, parts, spans, first)
        raise Refused("template_changes_text", "the template leaves out or changes what a turn says")

    def _cut(self, turns: Turns, parts: list[str], spans: list[tuple[int, int]], first: int) -> list[Piece]:
        """Cut where loss begins and ends; `spans` are places in the marked text."""
        place, found, spans = 0, list[tuple[str, bool, int]](), list(spans)
        for i, part in enumerate(parts):
            if i % 3 != 1 and part:
                found.append((part, i % 3 == 2, place))
            if i % 3 == 2 and not self._by_generation and turns[int(parts[i - 1])][0] == ANSWERS:
                if not parts[i + 1].startswith(self._end):
                    raise Refused("no_end_of_answer", f"an answer is followed by {parts[i + 1][:40]!r} and not by {self._end!r}")
                spans.append((place, place + len(part) + 1 + len(self._end)))
            if i % 3 == 2 and is_empty_answer(*turns[int(parts[i - 1])]):
                spans = [(begin, end) for begin, end in spans if not begin <= place < end]
            if i % 3 == 2 and int(parts[i - 1]) < first:
                spans = [(begin, end) for begin, end in spans if not begin <= place < end]
            place += len(part) + 1
        pieces = []
        for text, content, at in found:
            edges = sorted({0, len(text)} | {edge - at for span in spans for edge in span if 0 < edge - at < len(text)})
            for begin, end in itertools.pairwise(edges):
                loss = self._loss == "all" or any(start <= at + begin < stop for start, stop in spans)
                pieces.append(Piece(text[begin:end], content, loss))
        return pieces

    def _render(self, turns: Turns, ask: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """(the conversation as text, where in it `{% generation %}` stands); `ask`: as a question that is to be answered."""
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            rendered: Any = render_jinja_template([messages], chat_template=self._source, add_generation_prompt=ask, **self._special,
                                                  return_assistant_tokens_mask=self._by_generation)
        except Exception as error:                         # a template is a program, and fails as it likes
            raise Refused("template_refuses", " ".join(f"{type(error).__name__}: {error}".split())) from None
        (text,), spans = rendered
        return text, spans[0] if self._by_generation else []


def read_template(folder: Path, eos: str, loss: str, where: str, given: str | None = None) -> Template:
    """The chat template of a tokenizer's folder, or the `given` one with that tokenizer. Raises InputError."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    try:
        source = given or tokenizer.get_chat_template()
    except ValueError as error:
        raise InputError(f"the tokenizer has no chat template: {str(error).splitlines()[0]}", where=where,
                         remedy="give one as tokenizer.chat_template") from None
    return Template(tokenizer.backend_tokenizer, source, tokenizer.special_tokens_map, eos, loss, where)


def _num_alike(one: str, other: str) -> int:
    """The characters with which both texts begin."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
