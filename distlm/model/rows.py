"""Documents that each stand in a window with much padding, side by side in rows with little.

    packed = pack(tokens, positions, owners, kept, lengths)
    model(input_ids=packed.tokens, position_ids=packed.positions).logits.flatten(0, 1)[packed.kept]
"""

from typing import NamedTuple

import torch

from distlm.model.loss import TRIM_TOKENS

WIDTHS = 16
"""So many widths of rows are tried, about."""


class Packed(NamedTuple):
    """Rows of documents."""

    tokens: torch.Tensor
    """int64[rows, width], 0 behind the last document of a row."""
    positions: torch.Tensor
    """int64[rows, width], from 0 in each document, to which attention keeps; each token of padding is one of its own."""
    kept: torch.Tensor
    """int64[n]: where in the flattened rows the places are that were given."""


class Rows(NamedTuple):
    """How documents lie in rows of one width."""

    number: int
    width: int
    begins: list[int]
    """Of each document, in the rows as they stand behind one another."""


def pack(tokens: torch.Tensor, positions: torch.Tensor, owners: torch.Tensor, kept: torch.Tensor, lengths: torch.Tensor) -> Packed:
    """Put documents side by side, of each so many tokens as `lengths`, int64[documents], says.

    tokens, positions, owners: int64[windows, context], the last one the number of the document that each token is of. kept: int64[n],
    places in the flattened windows."""
    owners, places = owners.flatten(), positions.flatten()
    rows = fewest_tokens(lengths.tolist(), tokens.shape[1])
    begins = torch.tensor(rows.begins, dtype=torch.int64, device=tokens.device)
    used = (places < lengths[owners]).nonzero().squeeze(1)
    to = begins[owners[used]] + places[used]
    blank = tokens.new_zeros(rows.number * rows.width)
    made, stand = (blank.scatter(0, to, values[used]).view(rows.number, rows.width) for values in (tokens.flatten(), places))
    return Packed(made, stand, begins[owners[kept]] + places[kept])


def fewest_tokens(lengths: list[int], most: int) -> Rows:
    """Rows of one width, `most` at most, for documents of these lengths, none above that, each whole in one row. Of several widths that is
    taken with which all rows together are shortest, padding too; of equal ones the least, where attention has the least to do.

    `most` is among them: of pairs that each fit a row of it, first-fit decreasing (Johnson 1973) makes no more rows than there are pairs,
    so that rows are never more than the windows were."""
    longest = min(most, _rounded(max(lengths, default=0), TRIM_TOKENS))
    step = _rounded(-(-most // WIDTHS), TRIM_TOKENS)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found = [_first_fit(lengths, order, width, most) for width in [*range(longest, most, step), most]]
    return min(found, key=lambda rows: (rows.number * rows.width, rows.width))


def _first_fit(lengths: list[int], order: list[int], capacity: int, most: int) -> Rows:
    """Each document in the first row that has room for it, in the `order` given; rows as wide as the longest needs, rounded up."""
    filled, places = [0], [(0, 0)] * len(lengths)
    for i in order:
        row = next((row for row, size in enumerate(filled) if size + lengths[i] <= capacity), len(filled))
        if row == len(filled):
            filled.append(0)
        places[i] = row, filled[row]
        filled[row] += lengths[i]
    width = min(most, _rounded(max(filled), TRIM_TOKENS))
    return Rows(len(filled), width, [row * width + begin for row, begin in places])


def _rounded(size: int, multiple: int) -> int:
    """Up to a multiple, one at least."""
    return max(1, -(-size // multiple)) * multiple
