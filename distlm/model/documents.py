"""Whether a model keeps the documents of a window apart, as packed training asks of it.

transformers builds a block-diagonal causal mask out of positions that begin again (`masking_utils.find_packed_sequence_indices`), but
not in every family, and not in every implementation of attention; where it does not, positions are just positions, and nothing says so.
"""

import copy
from typing import TYPE_CHECKING

import torch

from distlm.errors import SpecError
from distlm.model.attention import NAME
from distlm.model.build import num_parameters
from distlm.model.loss import PLAIN_HEADS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

IMPLEMENTATIONS = ("eager", "sdpa", NAME)
FIRST, SECOND = 4, 4
"""Tokens of the two documents; together no more than the smallest context."""
TOLERANCE = 1e-4
KEPT_APART = PLAIN_HEADS - {"gpt_oss"}
"""Families that need no look, as a test holds them to it. gpt_oss makes its masks without positions."""
MOST = 250_000_000
"""Parameters of a model that is built only to be checked."""


def check_family(config: "PreTrainedConfig") -> None:
    """`check_documents_apart` before there is a model: on one layer of it over a small vocabulary. Raises SpecError. What cannot be built
    so, or is large even then, is left to the check of the whole model."""
    check_attention(config._attn_implementation_internal or "sdpa")
    if config.model_type not in KEPT_APART:
        model = small(config)
        if model is not None:
            check_documents_apart(model)


def small(config: "PreTrainedConfig") -> "PreTrainedModel | None":
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    text = config.get_text_config()
    try:
        text.num_hidden_layers, text.vocab_size, text.pad_token_id = 1, 32, None
        if isinstance(vars(text).get("layer_types"), list):
            text.layer_types = text.layer_types[:1]
        if num_parameters(config) > MOST:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model(input_ids=torch.zeros(1, FIRST + SECOND, dtype=torch.int64), use_cache=False)
        return model
    except Exception:                                      # families fail in their own ways when they are cut
        return None


def check_attention(attention: str) -> None:
    if attention not in IMPLEMENTATIONS:
        raise SpecError(f"{attention} attends over the documents of a batch of windows", where="model.config.attn_implementation",
                        remedy="take sdpa, or set batch.mask_documents to false")


@torch.no_grad()
def check_documents_apart(model: "PreTrainedModel") -> None:
    """Raises SpecError unless a document's logits are the same behind another document as alone. The model is whole, in float32."""
    check_attention(model.config._attn_implementation)
    family, training = model.config.model_type, model.training
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
