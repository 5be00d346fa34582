"""An endpoint that scores windows: /v1/completions with `echo`, `logprobs: 1` and `max_tokens: 0` gives the log-probability of each token
of a prompt, and of the likeliest one in its place. One of a classifier gives the logits of its labels: /v1/classify with
`use_activation: false`.

A window is a prompt of context + 1 tokens, of which the model reads all but the last. Where documents are kept apart, each piece of a
document is a prompt of its own.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np

from distlm.corpus.manifest import read_manifest
from distlm.corpus.stream import START
from distlm.errors import InputError, ServeError
from distlm.evaluate.kinds import kind_of
from distlm.evaluate.labels import Observed, not_finite, observed
from distlm.evaluate.task import Labelled, Reader, Rows, Task, check_classifier, with_labels
from distlm.evaluate.worker import Asked, Said, Scores, said, sums
from distlm.model.complete import check_prompts
from distlm.model.find import find_model
from distlm.model.vocabulary import FILE, vocabulary_hash
from distlm.progress import Progress
from distlm.runs import RunFolder
from distlm.serve.client import ADAPTERS, gone, healthy
from distlm.serve.engine import NONFINITE, NotFinite
from distlm.serve.guard import read_key
from distlm.spec import EvaluateSpec
from distlm.spec.load import nearest
from distlm.storage import Storage, read_json
from distlm.train.totals import Sums

PROMPTS = 256
"""Of one request, at most."""
ANSWER_S = 600
"""So long an answer is waited for, and so long a request is sent again to an endpoint that is full."""
BUSY = (429, 503)
STOPS = 4
"""Texts that end a completion, at most: so many does OpenAI's API take."""
TOKEN = "token_id:"
"""Begins the names of tokens that are given by their ids."""
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Endpoint:
    """Where an endpoint is, and what stands for what it serves."""

    url: str
    """With /v1 at its end."""
    key_file: Path
    model: str | None
    """The name of its model; None for the first that it tells of."""
    record: dict[str, Any] | None = None
    """The endpoint.json of one of ours."""

    @property
    def classifies(self) -> bool:
        """Whether it is known to be that of a classifier."""
        return bool(self.record and self.record.get("classifier"))

    def told(self) -> dict[str, Any]:
        """For the lineage of an evaluation. The version of one of ours changes whenever it is replaced."""
        of_ours = {key: self.record.get(key) for key in ("version", "source", "lineage")} if self.record else {}
        if self.record and self.model in self.record.get("adapters", {}):
            of_ours["lineage"] = self.record["adapters"][self.model]
        return {"endpoint": self.url, **({"endpoint_model": self.model} if self.model else {}), **of_ours}


def find_endpoint(spec: EvaluateSpec, storage: Storage) -> Endpoint:
    """Raises InputError for one that is not there, or whose key cannot be read. An address is that of one of ours where its key file is."""
    given = spec.endpoint
    assert given is not None
    folder = storage.root / "endpoints"
    records = {path.parent.name: read_json(path) for path in folder.glob("*/endpoint.json")}
    if not isinstance(given, str):
        key_file, url = Path(given.api_key_file).expanduser().absolute(), f"{given.url.rstrip('/').removesuffix('/v1')}/v1"
        read_key(key_file)
        ours = next((record for record in records.values()
                     if record["url"] == url and Path(record["api_key_file"]).resolve() == key_file.resolve()), None)
        return Endpoint(url, key_file, given.model or (ours["model"] if ours else None), ours)
    name = next((name for name, record in records.items() if given in (name, record["url"])), None)
    if name is None:
        near = nearest(given, records)
        raise InputError(f"there is no endpoint {given} under {folder}", where="endpoint", remedy=f"did you mean {near}?" if near else
                         "bring it up with a spec of `kind: serve`, or give url and api_key_file")
    record = records[name]
    read_key(Path(record["api_key_file"]))
    return Endpoint(record["url"], Path(record["api_key_file"]), record["model"], record)


def find_tokenizer(spec: EvaluateSpec, task: Task, endpoint: Endpoint, storage: Storage) -> Path | None:
    """The folder of the tokenizer by which an endpoint is asked of tasks; None where there are none. Raises InputError."""
    if not spec.tasks:
        return None
    if spec.tokenizer is not None:
        given = Path(spec.tokenizer).expanduser().absolute()
        return given if (given / FILE).is_file() else find_model(spec.tokenizer, storage, "tokenizer")
    if task.parts:
        return read_manifest(task.parts[0].corpus).tokenizer
    record = endpoint.record or {}
    own = Path(str(record.get("folder"))) / ADAPTERS / str(endpoint.model)     # of an adapter
    if source := next((place for place in (own, Path(str(record.get("source")))) if (place / FILE).is_file()), None):
        return source
    raise InputError("it is not known by which tokenizer the endpoint is to be asked of tasks", where="tokenizer",
                     remedy="name a folder with its tokenizer.json, or a run")


def by_endpoint(spec: EvaluateSpec, task: Task, check: Callable[[int | None, Path | None], None], prompts: list[list[int]],
                scored: Callable[["Client", Task, str, Path | None, list[Any], list[str]], None], storage: Storage, folder: RunFolder,
                progress: Progress) -> None:
    """Let an endpoint score the batches; `check` and `scored` are as in the driver. Raises InputError for an endpoint that is not that of
    the corpora or refuses the key, ServeError for one that does not answer."""
    endpoint = find_endpoint(spec, storage)
    if endpoint.record is not None and not healthy(endpoint.record):     # anybody may listen there: the key is not sent
        why = "nobody listens there" if gone(endpoint.record) else "it does not prove that it knows its key and serves its model"
        raise ServeError(why, where=f"endpoint: {endpoint.url}", remedy=f"`distlm status {endpoint.record['app']}` shows how it stands")
    Client(endpoint, spec, task, progress, folder).measure(prompts, check, find_tokenizer(spec, task, endpoint, storage), scored)


class Client:
    """Asks the endpoint, a bounded number of requests at once."""

    def __init__(self, endpoint: Endpoint, spec: EvaluateSpec, task: Task, progress: Progress, folder: RunFolder) -> None:
        self.endpoint, self.spec, self.task, self.progress, self.folder = endpoint, spec, task, progress, folder
        self.where, self.model, self.again = f"endpoint: {endpoint.url}", endpoint.model, 0
        self.context: int | None = None

    def measure(self, prompts: list[list[int]], check: Callable[[int | None, Path | None], None], tokenizer: Path | None,
                scored: Callable[["Client", Task, str, Path | None, list[Any], list[str]], None]) -> None:
        """As `by_endpoint`."""
        key, limits = read_key(self.endpoint.key_file), httpx.Limits(max_connections=self.spec.concurrent)
        with httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=httpx.Timeout(ANSWER_S, connect=10), limits=limits,
                          trust_env=False) as self.http:
            card = self.card()
            self.model, self.context = str(card["id"]), card.get("max_model_len")
            if "labels" in card:
                manifests = [read_manifest(part.corpus) for part in self.task.parts]
                check_classifier(self.spec, manifests, f"{self.model} at {self.endpoint.url}")
                kind = f"{'multi' if card['multiple_labels'] else 'single'}_label_classification"
                self.task = with_labels(self.task, manifests, card["labels"], kind, self.where)
            self.check(card, prompts, tokenizer)
            check(self.context, tokenizer)
            self.progress.note(f"{self.task.windows:,} windows in {len(self.task.batches):,} requests, " * bool(self.task.parts)
                               + f"{self.spec.concurrent} at once")
            scored(self, self.task, f"{self.model} at {self.endpoint.url}", tokenizer, self.score_all(),
                   [self.complete(prompt) for prompt in prompts])
        if self.again:
            self.progress.note(said := f"the endpoint was full, and requests were sent {self.again:,} times again")
            self.folder.event("note", message=said)

    def card(self) -> dict[str, Any]:
        """What the endpoint tells of the model."""
        cards = (self.ask("GET", "models"))["data"]
        card = next((one for one in cards if self.model in (None, one["id"])), None)
        if card is None:
            raise InputError(f"it does not serve {self.model}", where=self.where,
                             remedy=f"it serves {', '.join(one['id'] for one in cards)}")
        return dict(card)

    def check(self, card: dict[str, Any], prompts: list[list[int]], tokenizer: Path | None) -> None:
        """Raises InputError where what is served is not for the corpora or the tokenizer, as far as it is told."""
        context, vocabulary, theirs = card.get("max_model_len"), card.get("vocab_size"), card.get("vocabulary_hash")
        if tokenizer is not None and theirs not in (None, vocabulary_hash(tokenizer)):
            raise InputError(f"the tokenizer of the model that it serves is not that in {tokenizer}", where=self.where,
                             remedy="name the model's own with `tokenizer`, or prepare the corpus with it")
        for part in self.task.parts:
            manifest = read_manifest(part.corpus)
            if theirs is not None and theirs != vocabulary_hash(manifest.tokenizer):
                raise InputError(f"the tokenizer of the model that it serves is not that of the corpus {part.name}", where=self.where,
                                 remedy="prepare the corpus with the model's tokenizer")
            if vocabulary is not None and vocabulary < manifest.vocab_size:
                raise InputError(f"it serves a model of {vocabulary} tokens, and the corpus {part.name} has {manifest.vocab_size}",
                                 where=self.where, remedy="prepare the corpus with the model's tokenizer")
            if context is not None and context < manifest.context:
                raise InputError(f"it takes {context} tokens of context, and the corpus {part.name} has windows of {manifest.context}",
                                 where=self.where, remedy=f"prepare the corpus with context: {context}")
        check_prompts(prompts, self.spec.max_tokens, context)
        if theirs is None:
            self.progress.note(f"the endpoint does not tell its tokenizer, which is taken to be {tokenizer or 'that of the corpora'}")

    def score_all(self) -> list[Any]:
        """The sums of every batch, or what a classifier makes of it, in order."""
        batches, reader, done = self.task.batches, Reader(self.task), 0

        def show(batch: int) -> None:
            nonlocal done
            done += batches[batch][2]
            self.progress.update("windows", done, self.task.windows)

        kind = kind_of(self.task)
        return self.at_once(kind.measure(self), (kind.read(reader, batch) for batch in range(len(batches))), show)

    def at_once(self, ask: Callable[[T], R], batches: Iterable[T], done: Callable[[int], None]) -> list[R]:
        """What is answered to every batch, in order; as many are asked at once as the spec says, and `done` is told the number of each."""
        found, on_way = dict[int, R](), dict["Future[R]", int]()

        def take(most: int) -> None:
            while len(on_way) > most:
                for future in wait(on_way, return_when=FIRST_COMPLETED).done:
                    batch = on_way.pop(future)
                    found[batch] = future.result()
                    done(batch)

        with ThreadPoolExecutor(self.spec.concurrent) as pool:
            try:
                for number, batch in enumerate(batches):
                    on_way[pool.submit(ask, batch)] = number
                    take(2 * self.spec.concurrent)
                take(0)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [found[number] for number in range(len(found))]

    def continuations(self, batches: list[list[Asked]], done: Callable[[int], None]) -> list[list[Said]]:
        """As harness.Answering."""
        def ask(batch: list[Asked]) -> list[Said]:
            found: list[Said] = []
            for first in range(0, len(batch), PROMPTS):
                some = batch[first:first + PROMPTS]
                for (tokens, at), (logprobs, best, _) in zip(some, self.echo([tokens for tokens, _ in some]), strict=True):
                    found.append(said(logprobs[at - 1:], [one == token for one, token in zip(best[at - 1:], tokens[at:], strict=True)]))
            return found

        return self.at_once(ask, batches, done)

    def generations(self, batches: list[list[list[int]]], max_tokens: int, stops: list[str],
                    done: Callable[[int], None]) -> list[list[list[int]]]:
        """As harness.Answering. Of `stops` the endpoint is told as many as the API has room for; the others are met by who asks."""
        def ask(prompts: list[list[int]]) -> list[list[int]]:
            return [tokens for first in range(0, len(prompts), PROMPTS)
                    for tokens in self.added(prompts[first:first + PROMPTS], max_tokens, stops[:STOPS])]

        return self.at_once(ask, batches, done)

    def added(self, prompts: list[list[int]], max_tokens: int, stops: list[str]) -> list[list[int]]:
        """The tokens that the endpoint adds to each prompt."""
        answer = self.ask("POST", "completions", {"model": self.model, "prompt": prompts, "max_tokens": max_tokens, "temperature": 0,
                                                  "stop": stops, "logprobs": 1, "return_tokens_as_token_ids": True})
        told = {choice["index"]: (choice["logprobs"] or {}).get("tokens", []) for choice in answer["choices"]}
        if [*sorted(told)] != [*range(len(prompts))] or not all(name.startswith(TOKEN) for names in told.values() for name in names):
            raise self.no_ids("an answer")
        return [[int(name.removeprefix(TOKEN)) for name in told[i]] for i in range(len(prompts))]

    def no_ids(self, of: str) -> ServeError:
        return ServeError(f"it does not give back the tokens of {of} by their ids with echo, logprobs and return_tokens_as_token_ids",
                          where=self.where, cause="bad_input", remedy="serve the model with `kind: serve`, or evaluate it by `model`")

    def score(self, rows: Rows) -> Sums:
        """The sums of a batch."""
        logprobs, best, sure = (np.zeros(rows.kept.shape, kind) for kind in (np.float32, np.int64, np.float32))
        places = list(pieces(rows))
        for first in range(0, len(places), PROMPTS):
            some = places[first:first + PROMPTS]
            asked = [rows.tokens[row, begin:end].tolist() for row, begin, end in some]
            for (row, begin, end), one in zip(some, self.echo(asked), strict=True):
                logprobs[row, begin:end - 1], best[row, begin:end - 1], sure[row, begin:end - 1] = one
        return sums(self.task, rows, Scores(logprobs[rows.kept], best[rows.kept], sure[rows.kept]))

    def observe(self, documents: Labelled) -> Observed:
        """What a classifier makes of a batch: texts are sent without the token that ends them, and without padding. Raises EvaluationError
        where a logit is not finite."""
        found: list[list[float]] = []
        texts = [row[:length].tolist() for row, length in zip(documents.tokens, documents.lengths, strict=True)]
        for first in range(0, len(texts), PROMPTS):
            asked = {"model": self.model, "input": texts[first:first + PROMPTS], "use_activation": False}
            try:
                answer = self.ask("POST", "classify", asked)
            except NotFinite:
                raise not_finite(documents) from None
            told = sorted(answer["data"], key=lambda one: int(one["index"]))
            found += [[one["logits"][name] for name in self.task.labels] for one in told]
        return observed(documents, np.concatenate([documents.labels, np.array(found)], 1, dtype=np.float32))

    def echo(self, prompts: list[list[int]]) -> list[tuple[list[float], list[int], list[float]]]:
        """Of each prompt, for each token but the first: its log-probability, the likeliest token, the probability of that."""
        answer = self.ask("POST", "completions", {"model": self.model, "prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 0,
                                                  "temperature": 0, "return_tokens_as_token_ids": True})
        choices = {choice["index"]: choice["logprobs"] for choice in answer["choices"]}
        found = []
        for i, prompt in enumerate(prompts):
            told = choices.get(i) or {}
            if told.get("tokens") != [f"{TOKEN}{token}" for token in prompt]:
                raise self.no_ids("a prompt")
            tops = [max(top.items(), key=lambda item: item[1]) for top in told["top_logprobs"][1:]]
            found.append((told["token_logprobs"][1:], [int(name.removeprefix(TOKEN)) for name, _ in tops],
                          np.exp([value for _, value in tops]).tolist()))
        return found

    def complete(self, prompt: Sequence[int]) -> str:
        """What the endpoint adds to a prompt."""
        answer = self.ask("POST", "completions", {"model": self.model, "prompt": list(prompt), "max_tokens": self.spec.max_tokens,
                                                  "temperature": 0})
        return str(answer["choices"][0]["text"])

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a request, which is sent again while the endpoint is full. Raises InputError, ServeError."""
        deadline = time.monotonic() + ANSWER_S
        while True:
            try:
                answer = self.http.request(method, f"{self.endpoint.url}/{path}", json=body)
            except httpx.ReadTimeout:
                raise ServeError(f"the endpoint has not answered a request in {ANSWER_S} s", where=self.where, cause="timeout",
                                 remedy="lower concurrent, batch_windows or what is asked of it") from None
            except httpx.HTTPError as error:
                raise ServeError(f"the endpoint cannot be reached: {error or type(error).__name__}", where=self.where,
                                 remedy="`distlm runs` shows what is up") from None
            if answer.status_code not in BUSY or "Retry-After" not in answer.headers or time.monotonic() > deadline:
                return self.read(answer)
            self.again += 1
            after = answer.headers["Retry-After"]
            time.sleep(float(after) if after.isdigit() else 2)

    def read(self, answer: httpx.Response) -> dict[str, Any]:
        """What an answer holds. Raises InputError, ServeError where it is an error, NotFinite where that is the code of it."""
        code = None
        try:
            told = answer.json()
            if answer.status_code == 200 and isinstance(told, dict):
                return told
            message, code = str(told["error"]["message"]), told["error"].get("code")
        except (ValueError, KeyError, TypeError):
            message = answer.text[:200]
        if answer.status_code in (401, 403):
            raise InputError("the endpoint refuses the key", where=f"endpoint: {self.endpoint.key_file}",
                             remedy="name the file that holds the endpoint's own key")
        cause = "bad_input" if answer.status_code < 500 else ""
        kind = NotFinite if code == NONFINITE else ServeError
        raise kind(f"{message} (status {answer.status_code})", where=self.where, cause=cause)


def pieces(rows: Rows) -> Iterator[tuple[int, int, int]]:
    """(window, first token, end) of what are prompts of their own, up to the last token that gives loss: the windows, or where documents
    are kept apart their pieces in each window."""
    for row, kept in enumerate(rows.kept):
        starts = np.flatnonzero(rows.marks[row] & START) if rows.part.mask_documents else np.zeros(1, np.int64)
        for begin, end in zip(starts.tolist(), [*starts[1:].tolist(), len(kept) + 1], strict=True):
            wanted = np.flatnonzero(kept[begin:end - 1])
            if len(wanted):
                yield row, begin, begin + int(wanted[-1]) + 2
