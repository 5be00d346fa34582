"""What a model makes of a text: how much each token surprises it, and on which tokens its prediction rests.

    found = explain("my-model", "def read_lines(path):\\n    with open(path) as ")
    found.target, found.probability, [(one.text, one.surprisal, one.attribution) for one in found.tokens]
    write_page(found, Path("explain.html"))
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from distlm.errors import InputError
from distlm.model.build import check_servable, has_classifier, labels_of, load_model
from distlm.model.encoder import UNFRAMED, check_frame, is_encoder, read_frame, room
from distlm.model.find import check_whole, find_model
from distlm.model.reading import Reading, recorded_reading
from distlm.serve.text import HALF_PAIR, has_half_pair
from distlm.spec.load import nearest
from distlm.storage import Storage, write_atomic

if TYPE_CHECKING:
    import torch

STEPS, TOGETHER = 256, 16
"""Points of the path by default, and how many go through the model at once."""
TOLERANCE = 0.05
"""The share of what is explained that the attributions may miss before it is said."""


@dataclass(frozen=True)
class TokenFacts:
    """A token of the text."""

    text: str
    """"" for one that begins inside of a character."""
    surprisal: float | None
    """-log2 p given the tokens before it, in bits; None for the first, and where the model is a classifier."""
    attribution: float
    """What it adds to the log-probability of the target, in nats."""


@dataclass(frozen=True)
class Explanation:
    """All that is known of one text and one prediction."""

    model: str
    target: str
    """The next token, or the label, that is explained."""
    probability: float
    tokens: tuple[TokenFacts, ...]
    added: float
    """log p(target) after the text, less that after mean tokens in its place, in nats: what attributions add up to."""
    steps: int
    truncated: bool = False
    """Whether the text was cut, as the classifier's documents were."""

    @property
    def gap(self) -> float:
        """The sum of the attributions less `added`, in nats: none with infinitely many steps (Sundararajan et al. 2017, proposition 1)."""
        return math.fsum(one.attribution for one in self.tokens) - self.added

    @property
    def complete(self) -> bool:
        """Whether the gap is small beside what the tokens add and take away."""
        return abs(self.gap) <= TOLERANCE * max(abs(self.added), math.fsum(abs(one.attribution) for one in self.tokens))

    @property
    def bits(self) -> float | None:
        """The mean surprisal."""
        known = [one.surprisal for one in self.tokens if one.surprisal is not None]
        return math.fsum(known) / len(known) if known else None


def explain(model: str, text: str, *, target: str | None = None, steps: int = STEPS,
            storage: Storage | str | Path | None = None) -> Explanation:
    """Surprisal of each token, and attributions by integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365, equation 1) of log p
    of the next token after `text`, or of a classifier's label; the likeliest one unless `target` names another.

    The path leads over input embeddings, from the mean of all tokens' in every place, at the midpoints of `steps` equal parts, in float32.
    Special tokens around a text that an encoder reads stay as they are. (From zero it would not do, nor from a padding token, which often
    is zero: a model that begins with a norm sees the same direction all the way.) `model` is a run by name or path, or a folder that
    transformers loads. Raises InputError."""
    import torch
    from transformers import AutoTokenizer

    if steps < 1:
        raise InputError(f"{steps} points are no path", where="steps", remedy="take 1 or more")
    for name, said in (("text", text), ("target", target or "")):
        if has_half_pair(said):
            raise InputError(HALF_PAIR, where=name, remedy="take it out")
    folder = find_model(model, Storage.given(storage))
    check_whole(folder)
    network: Any = load_model(folder, f"model: {folder}", torch.float32, exact=False).eval().requires_grad_(False)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    labels, reading = None, Reading()
    if has_classifier(network.config):
        check_servable(network.config, str(folder))
        labels = labels_of(network.config)
        reading = recorded_reading(folder)                 # as its endpoint reads it
    frame, context = UNFRAMED, getattr(network.config.get_text_config(), "max_position_embeddings", None)
    if is_encoder(network.config):
        frame = read_frame(folder)
        check_frame(network.config, frame, str(folder))
        context = room(network.config, frame)
    ids, pieces, truncated = _tokens(tokenizer, reading.cleaned(text), reading.cut_tokens, context)
    several = network.config.problem_type == "multi_label_classification"

    def log_probs(logits: "torch.Tensor") -> "torch.Tensor":
        """[n, any] of what the model gives."""
        last = (logits if labels else logits[:, -1]).float()
        return torch.nn.functional.logsigmoid(last) if several else last.log_softmax(-1)

    embed = network.get_input_embeddings()
    given = embed(ids)
    before, behind = (embed(torch.tensor(each, dtype=torch.long)) for each in frame)

    def forward(points: "torch.Tensor") -> "torch.Tensor":
        """float[n, tokens, width] to float[n, any]; what stands around the text stays as it is."""
        rows = torch.cat([before.expand(len(points), -1, -1), points, behind.expand(len(points), -1, -1)], 1)
        cache = {} if frame.size else {"use_cache": False}
        return log_probs(network(inputs_embeds=rows, attention_mask=torch.ones(rows.shape[:2], dtype=torch.long), **cache).logits)

    here = forward(given[None])[0]
    chosen = int(here.argmax()) if target is None else _label(labels, target) if labels else _token(tokenizer, target)
    base = embed(torch.arange(embed.num_embeddings)).mean(0).expand_as(given)
    attributions = integrated_gradients(lambda points: forward(points)[:, chosen], base, given, steps)
    added = float(here[chosen] - forward(base[None])[0, chosen])
    surprisals = [None] * len(ids) if labels else [None, *_surprisal(network, ids)]
    return Explanation(str(folder), labels[chosen] if labels else tokenizer.decode([chosen]), float(here[chosen].exp()),
                       tuple(TokenFacts(*each) for each in zip(pieces, surprisals, attributions.tolist(), strict=True)), added, steps,
                       truncated)


def integrated_gradients(score: "Callable[[torch.Tensor], torch.Tensor]", base: "torch.Tensor", given: "torch.Tensor",
                         steps: int) -> "torch.Tensor":
    """What each row of `given` adds to `score`: (given - base) times the mean gradient on the way from `base`, summed over the width.

    base, given: float[tokens, width]; score: float[n, tokens, width] to float[n]. Returns float[tokens]."""
    import torch

    total, way = torch.zeros_like(given), given - base
    for part in ((torch.arange(steps) + 0.5) / steps).split(TOGETHER):
        points = (base + part[:, None, None] * way).requires_grad_()
        [gradient] = torch.autograd.grad(score(points).sum(), points)
        total += gradient.sum(0)
    return (total / steps * way).sum(-1)


def write_page(found: Explanation, file: Path) -> None:
    """Write two heat maps on one page that needs no network and no script. Raises StorageError."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("distlm", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    most = max((one.surprisal or 0 for one in found.tokens), default=0) or 1
    strongest = max((abs(one.attribution) for one in found.tokens), default=0) or 1
    surprising = [(_visible(one.text), round(80 * one.surprisal / most), f"{one.surprisal:.2f} bits")
                  for one in found.tokens if one.surprisal is not None]
    first = [(_visible(one.text), 0, "the first token") for one in found.tokens[:1] if found.bits is not None]
    page = environment.get_template("attribution.html.j2").render(
        found=found, surprising=first + surprising,
        attributed=[(_visible(one.text), round(80 * abs(one.attribution) / strongest), f"{one.attribution:+.3f} nats", one.attribution < 0)
                    for one in found.tokens])
    write_atomic(file, page.encode("utf-8", "replace"))


def _surprisal(network: Any, ids: "torch.Tensor") -> list[float]:
    import torch

    from distlm.model.loss import token_scores

    with torch.no_grad():
        return [-nats / math.log(2) for nats in token_scores(network, ids[None]).logprobs[0].tolist()] if len(ids) > 1 else []


def _tokens(tokenizer: Any, text: str, cut: int | None, context: int | None) -> tuple["torch.Tensor", list[str], bool]:
    """(int64[n], what each says, whether there were more than `cut`). Raises InputError, also for more than `context`."""
    import torch

    if not text:
        raise InputError("there is no text to explain", where="text", remedy="write some, or send it to `distlm explain NAME -`")
    made = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    ids, spans = made["input_ids"], made["offset_mapping"]
    if not ids:
        raise InputError("the tokenizer makes no token of it", where="text", remedy="write more")
    whole, ids, spans = len(ids), ids[:cut], spans[:cut]
    if context is not None and len(ids) > context:
        raise InputError(f"{len(ids):,} tokens are more than the {context:,} of the model's context", where="text", remedy="shorten it")
    pieces, end = [], 0
    for begin, behind in spans:                            # tokens inside of one character have its span, all of them
        pieces.append(text[max(begin, end):behind])
        end = max(end, behind)
    return torch.tensor(ids), pieces, len(ids) < whole


def _token(tokenizer: Any, target: str) -> int:
    ids = tokenizer(target, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(f"{target!r} is {len(ids)} tokens, and one is predicted", where="target",
                         remedy=f"take its first, {tokenizer.decode(ids[:1])!r}" if ids else "write one")
    return int(ids[0])


def _label(labels: list[str], target: str) -> int:
    if target not in labels:
        near = nearest(target, labels)
        raise InputError(f"the classifier has no label {target!r}", where="target",
                         remedy=f"did you mean {near}?" if near else f"its labels are {', '.join(labels[:20])}")
    return labels.index(target)


def _visible(text: str) -> str:
    """A piece of text in which white space is seen."""
    return "·" if not text else text.replace("\n", "⏎\n").replace("\t", "⇥   ")
