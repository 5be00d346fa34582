"""Model shapes by name, as `transformers` configurations. The vocabulary and the context come from the corpus."""

from typing import Any


def _llama(width: int, layers: int, heads: int, kv_heads: int, ffn: int, tied: bool, theta: float = 10_000.0) -> dict[str, Any]:
    return {"model_type": "llama", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "intermediate_size": ffn, "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


PRESETS: dict[str, dict[str, Any]] = {
    "llama-tiny": _llama(64, 2, 4, 2, 192, tied=True),
    "llama-4m": _llama(256, 4, 4, 4, 704, tied=True),
    "llama-10m": _llama(384, 6, 6, 6, 1024, tied=True),
    "gpt2-124m": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12},
    "llama-1b": _llama(2048, 16, 32, 8, 8192, tied=True, theta=500_000.0),
    "llama-8b": _llama(4096, 32, 32, 8, 14336, tied=False, theta=500_000.0),
}
