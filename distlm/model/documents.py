"""Whether a model keeps the documents of a window apart, as packed training asks of it.

transformers builds a block-diagonal causal mask out of positions that begin again (`masking_utils.find_packed_sequence_indices`), but
not in every family, and not in every implementation of attention; where it does not, positions are just positions, and nothing says so.
"""

from typing import TYPE_CHECKING

import torch

from distlm.errors import SpecError
from distlm.model.attention import NAME

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATIONS = ("eager", "sdpa", NAME)
FIRST, SECOND = 4, 4
"""Tokens of the two documents; together no more than the smallest context."""
TOLERANCE = 1e-4


@torch.no_grad()
def check_documents_apart(model: "PreTrainedModel") -> None:
    """Raises SpecError unless a document's logits are the same behind another document as alone. The model is whole, in float32."""
    family, attention = model.config.model_type, model.config._attn_implementation
    if attention not in IMPLEMENTATIONS:
        raise SpecError(f"{attention} attends over the documents of a batch of windows", where="model.config.attn_implementation",
                        remedy="take sdpa, or set batch.mask_documents to false")
    training = model.training
    model.eval()
    tokens = (torch.arange(FIRST + SECOND, device=model.device) * 7 + 3) % model.config.get_text_config().vocab_size
    positions = torch.cat([torch.arange(FIRST), torch.arange(SECOND)]).to(model.device)
    try:
        behind = model(input_ids=tokens[None], position_ids=positions[None], use_cache=False).logits[0, FIRST:]
        alone = model(input_ids=tokens[None, FIRST:], use_cache=False).logits[0]
        apart = bool((behind - alone).norm() <= TOLERANCE * alone.norm())
    except TypeError:                                      # a family that takes no positions
        apart = False
    model.train(training)
    if not apart:
        raise SpecError(f"the {family} family of transformers does not keep the documents of a window apart", where="batch.mask_documents",
                        remedy="set it to false")
