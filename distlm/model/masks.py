"""What transformers makes its masks by: whether documents stand behind one another in a window.

It looks into the positions of every forward pass for that, and a GPU is waited for meanwhile. Who has made the batch knows it.

    several = holds_several(positions)                     # on the host
    with documents_known(several):
        model(input_ids=tokens, position_ids=positions)
"""

import contextlib
from collections.abc import Iterator

import torch


def holds_several(positions: torch.Tensor) -> bool:
    """Whether some window holds several documents, as transformers tells them apart: where positions do not go on by one. positions:
    int64[batch, context]."""
    return bool((positions.diff(dim=1) != 1).any())


def document_numbers(positions: torch.Tensor) -> torch.Tensor:
    """int64[batch, context]: of each token the number of its document, from 0 in each window."""
    return (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(1)


@contextlib.contextmanager
def documents_known(several: bool | None) -> Iterator[None]:
    """Forward passes inside make their masks as if transformers had looked; None: it looks itself."""
    if several is None:
        yield
        return
    from transformers import masking_utils

    def tell(position_ids: torch.Tensor) -> torch.Tensor | None:
        return document_numbers(position_ids) if several else None

    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = tell
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look
