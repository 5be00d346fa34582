"""Encoders that classify texts: which families, what stands around a text, and how texts stand beside each other.

A text has a row of its own, as its tokenizer's post-processor writes it, `[CLS] text [SEP]`, and padding behind that, which
attention leaves out. So no text sees another, and positions begin anew with each, as the family counts them; a corpus with labels has
a window for each document anyhow. The head is the family's own, which reads the first token or what the checkpoint says: what was
trained of it goes on, and AutoModelForSequenceClassification loads the export with nothing of ours.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distlm.errors import InputError

if TYPE_CHECKING:
    import torch

FAMILIES = ("albert", "bert", "camembert", "data2vec-text", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "eurobert",
            "gte", "megatron-bert", "mobilebert", "modernbert", "mpnet", "nomic_bert", "rembert", "roberta", "roberta-prelayernorm",
            "roformer", "squeezebert", "xlm-roberta", "xlm-roberta-xl")
"""Those of which a test has that they read a text beside a longer one as they do alone, and how many tokens they take."""
BEHIND_PADDING = frozenset({"camembert", "data2vec-text", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"})
"""Families that count positions from the one behind the number of the padding token."""


class Frame(NamedTuple):
    """The special tokens that a tokenizer puts around a text."""

    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return len(self.before) + len(self.behind)

    def inputs(self, tokens: "torch.Tensor", lengths: "torch.Tensor", padding: int) -> "dict[str, torch.Tensor]":
        """What an encoder is called with for texts: input_ids and attention_mask, int64[texts, width + size]. tokens: int64[texts, width],
        of which the first `lengths`, int64[texts], are a text's."""
        import torch

        ends = lengths[:, None]
        places = torch.arange(tokens.shape[1] + self.size, device=tokens.device) - len(self.before)
        ids = torch.where((places >= 0) & (places < ends), tokens[:, places.clamp(0, tokens.shape[1] - 1)], padding)
        for i, token in enumerate(self.before):            # each in a kernel's arguments: none is a copy to the device
            ids = torch.where(places == i - len(self.before), token, ids)
        for i, token in enumerate(self.behind):
            ids = torch.where(places == ends + i, token, ids)
        return {"input_ids": ids, "attention_mask": (places < ends + len(self.behind)).long()}


UNFRAMED = Frame()


def is_encoder(config: Any) -> bool:
    """Whether a model of this configuration sees all tokens of a text, and so predicts none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_encoder_decoder", False) \
        and not getattr(config, "is_decoder", False)


def read_frame(tokenizer: Path) -> Frame:
    """What the post-processor of the tokenizer in a folder puts around a text; nothing where there is none."""
    import tokenizers

    if not (file := tokenizer / "tokenizer.json").is_file():
        return UNFRAMED
    made = tokenizers.Tokenizer.from_file(str(file))
    made.no_truncation()
    made.no_padding()
    own, whole = (made.encode("a", add_special_tokens=framed).ids for framed in (False, True))
    at = next((i for i in range(len(whole) - len(own) + 1) if own and whole[i:i + len(own)] == own), None)
    return UNFRAMED if at is None else Frame(tuple(whole[:at]), tuple(whole[at + len(own):]))


def room(config: Any, frame: Frame) -> int:
    """The tokens that a text may have, special ones not counted."""
    padding = 1 if config.model_type == "mpnet" else config.pad_token_id       # whatever mpnet's config.json says
    return int(config.max_position_embeddings - frame.size - (padding + 1 if config.model_type in BEHIND_PADDING else 0))


def check_frame(config: Any, frame: Frame, where: str) -> None:
    """Raises InputError where nobody can tell how an encoder that classifies is to be given a text."""
    if config.pad_token_id is None:
        raise InputError("its config.json names no pad_token_id, with which texts are filled up", where=where,
                         remedy="add it: the number of the tokenizer's padding token")
    if not frame.before:
        raise InputError("its tokenizer puts no special token before a text, where the classifier of an encoder reads", where=where,
                         remedy="save the tokenizer with the post-processor that the encoder was trained with")


def lengths_of(tokens: "torch.Tensor", end: int) -> "torch.Tensor":
    """int64[texts]: the tokens of each up to the last that is not `end`, with which rows are filled up, one at least. tokens: int64[texts,
    any]."""
    import torch

    return ((tokens != end) * torch.arange(1, tokens.shape[1] + 1, device=tokens.device)).amax(1).clamp(min=1)
