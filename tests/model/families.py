"""The smallest models of the families whose logits are never whole."""

from typing import Any

GPT2 = {"n_embd": 32, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
COMMON = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
          "max_position_embeddings": 32, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0, "attention_dropout": 0.0,
          "residual_dropout": 0.0, "router_jitter_noise": 0.0}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2,
           "moe_topk": 2, "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
"""As many families name them, each in its own way."""
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MIXTURES = {"deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "flex_olmo", "glm4_moe", "gpt_oss", "hunyuan_v1_moe", "minimax_m2",
            "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"}
STRETCHED = {"apertus", "cwm", "gpt_oss"}
"""Their positions are by default stretched from a context that is longer than ours."""


def tiny(family: str, layers: int) -> dict[str, Any]:
    """What `AutoConfig.for_model` is given for a model of a few thousand parameters that drops nothing out."""
    if family == "gpt2":
        return {"vocab_size": 97, "n_layer": layers, **GPT2}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}} if family in STRETCHED else {}
    return {"vocab_size": 97, "num_hidden_layers": layers, **COMMON, **(EXPERTS if family in MIXTURES else {}),
            **(LATENT if family.startswith("deepseek") else {}), **rope}
