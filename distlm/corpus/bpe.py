"""Byte-level BPE at speed: tiktoken, where it provably gives the tokens that `tokenizers` gives, at several times the pace.

`tokenizers` joins the pair that its list of merges has first; tiktoken the pair whose union is the token of lowest rank, and looks a whole
piece up before that. The two agree where every token comes of one merge alone, is what its own bytes are encoded to, and has a rank as
its merge has. For while they agree, two neighbours whose union is a token have been merged from its bytes alone, as encoding
that token by itself does, which ends in that token: so their union is its merge, and the lowest one is the same for both.
"""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import tiktoken
import tokenizers

PIECES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the pre-tokenizer `ByteLevel` splits text by (Radford et al. 2019)."""
_LONG_SPACE = re.compile(r"\s{100000}")                    # tiktoken's regex overflows its stack on a million


def byte_characters() -> list[str]:
    """The character that byte-level BPE writes for each byte (Radford et al. 2019, `bytes_to_unicode`)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


def fast_encoder(tokenizer: tokenizers.Tokenizer) -> Callable[[str], list[int]] | None:
    """What gives the tokens of a text, special tokens spelled in it taken for text; None for a tokenizer that tiktoken cannot replace."""
    ranks = _ranks(json.loads(tokenizer.to_str()), tokenizer.model)
    if ranks is None:
        return None
    encoding = tiktoken.Encoding("corpus", pat_str=PIECES, mergeable_ranks=ranks, special_tokens={})

    def encode(text: str) -> list[int]:
        if _LONG_SPACE.search(text):
            return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return encoding.encode_ordinary(text)
    return encode


def _ranks(data: dict[str, Any], model: Any) -> dict[bytes, int] | None:
    """The id of every token that text can become, by its bytes."""
    bpe, pieces = data["model"], data["pre_tokenizer"] or {}
    if (bpe["type"] != "BPE" or data["normalizer"] or any(not token["special"] for token in data["added_tokens"])
            or any(bpe.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"))
            or pieces.get("type") != "ByteLevel" or pieces["add_prefix_space"] or not pieces["use_regex"]):
        return None
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in bpe["merges"]]
    merged = [left + right for left, right in merges]
    ids = [bpe["vocab"].get(token, -1) for token in merged]
    single = {character: bpe["vocab"].get(character, -1) for character in byte_of}
    if (min(single.values()) < 0 or any(low >= high for low, high in pairwise(ids))
            or any(len(model.tokenize(token)) > 1 for token in merged)):
        return None
    return {bytes(byte_of[character] for character in token): i for token, i in [*single.items(), *zip(merged, ids, strict=True)]}
