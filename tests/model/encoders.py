"""The smallest encoders of each family, with random weights, as folders that transformers has saved, each with its tokenizer."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedTokenizerFast

WORDS = 64
CLS, SEP, PAD = WORDS, WORDS + 1, WORDS + 2
"""Behind the words t0 to t63."""
MOST = 100
"""max_position_embeddings, of which some families leave out as many as PAD says."""
SIZES: dict[str, Any] = {
    "vocab_size": WORDS + 3, "max_position_embeddings": MOST, "pad_token_id": PAD, "bos_token_id": CLS, "cls_token_id": CLS,
    "eos_token_id": SEP, "sep_token_id": SEP, "initializer_range": 0.2, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48, "embedding_size": 32, "dim": 32, "n_layers": 2,
    "n_heads": 4, "hidden_dim": 48, "global_attn_every_n_layers": 2, "local_attention": 8}
"""As families name them, each in its own way."""


def make_tokenizer(folder: Path) -> Path:
    """One of words, which puts [CLS] before a text and [SEP] behind it."""
    words = {f"t{i}": i for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel({**words, "[CLS]": CLS, "[SEP]": SEP, "[PAD]": PAD}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("[CLS]", "[SEP]", "[PAD]")])
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]",
                                                             special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
                            eos_token="t0").save_pretrained(folder)
    return folder


def config_of(family: str, **more: Any) -> Any:
    return AutoConfig.for_model(family, **{**SIZES, **more})


def make_encoder(folder: Path, family: str = "bert", loader: Any = AutoModelForMaskedLM, **more: Any) -> Path:
    """A checkpoint of an encoder that predicts masked tokens, or of what `loader` loads."""
    make_tokenizer(folder)
    torch.manual_seed(0)
    loader.from_config(config_of(family, **more)).save_pretrained(folder)
    return folder
