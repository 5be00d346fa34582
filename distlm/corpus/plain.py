"""Text to tokens of which none is special, whatever the text spells.

    tokenizer = plain(tokenizer, "<|endoftext|>")          # a copy that takes no token out of text before its model sees it
    spelled = respelled(tokenizer, "<|endoftext|>", where)
    ids = without_special(tokenizer.encode(text).ids, spelled)

A model of its own may still make a special token of text: a BPE whose merges spell it, a Unigram that has it as a piece. Such a token is
spelled by its characters instead, which stand for the same text.
"""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from distlm.corpus.bpe import byte_characters
from distlm.errors import InputError


def plain(tokenizer: tokenizers.Tokenizer, end: str) -> tokenizers.Tokenizer:
    """A copy for text alone: special tokens and the end token, which some tokenizers do not call special, are text."""
    copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.add_special_tokens([tokenizers.AddedToken(end, special=True, normalized=False)])
    copy.encode_special_tokens = True
    return copy


def respelled(tokenizer: tokenizers.Tokenizer, end: str, where: str) -> dict[int, list[int]]:
    """By id, each special token that the model may make of text, and the tokens of its characters. The unknown token is none of them: it is
    what text becomes. Raises InputError where the characters have no tokens of their own."""
    whole = json.loads(tokenizer.to_str())
    model, rules = tokenizer.model, whole["model"]
    of_bytes = '"ByteLevel"' in json.dumps(whole["pre_tokenizer"])
    merged = {"".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1) for merge in rules.get("merges", ())}
    unknown = rules.get("unk_id") if rules["type"] == "Unigram" else model.token_to_id(rules.get("unk_token") or "")
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special and i != unknown}
    found = {}
    for i in sorted(special):
        name = tokenizer.id_to_token(i) or ""
        if model.token_to_id(name) != i or not _is_made(tokenizer, rules, merged, of_bytes, name, i):
            continue
        parts = [[token.id for token in model.tokenize(character)] for character in name]
        ids = [one for part in parts for one in part]
        joins = rules["type"] == "Unigram" or (rules["type"] == "BPE" and not rules.get("continuing_subword_prefix")
                                               and not rules.get("end_of_word_suffix"))
        if not joins or not all(parts) or not {*special, unknown}.isdisjoint(ids):
            raise InputError(f"text that spells the special token {name!r} would become it, and its characters have no tokens of their own",
                             where=where, remedy="take a tokenizer whose special tokens are not made of text" +
                                                 (f", or one that ends documents with another token than {end!r}" if name == end else ""))
        found[i] = ids
    return found


def _is_made(tokenizer: tokenizers.Tokenizer, rules: dict[str, Any], merged: set[str], of_bytes: bool, name: str, i: int) -> bool:
    """Whether the model makes this token of some text. `merged`: what merges make; `of_bytes`: whether it sees bytes as characters."""
    if of_bytes and not set(name) <= set(byte_characters()):
        return False                                       # its characters are not what bytes are written by
    if rules["type"] == "BPE":
        return len(name) == 1 or bool(rules.get("ignore_merges")) or name in merged
    if rules["type"] == "Unigram":                         # where it is not the best way to write itself, it is not within a text
        return [token.id for token in tokenizer.model.tokenize(name)] == [i]
    return i in tokenizer.encode(name, add_special_tokens=False).ids


def without_special(ids: list[int], spelled: Mapping[int, list[int]]) -> list[int]:
    """The tokens of a text, special ones spelled."""
    if not spelled or spelled.keys().isdisjoint(ids):
        return ids
    return [one for i in ids for one in spelled.get(i, (i,))]
