"""Small models with random weights, each with a byte-level tokenizer, as `export/` folders."""

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

torch.set_num_threads(1)
TEXT = ["def main(argument):\n    return argument + 1\n", "the cat sat on the mat, and the dog — naïve — barked at 東京", "x = [1, 2, 3]"]
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 128, "max_position_embeddings": 128}
FAMILIES = {
    "llama": LLAMA,
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 16},
    "gemma3_text": {**LLAMA, "model_type": "gemma3_text", "head_dim": 16, "sliding_window": 64},
}


def make_model(folder: Path, config: dict, *, chat: bool = False, seed: int = 0) -> Path:
    """An export folder. Weights are large enough for logits that are not nearly equal."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                            special_tokens=["<|endoftext|>"], show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    if chat:
        fast.chat_template = CHAT
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    settings = dict(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), vocab_size=len(fast), eos_token_id=0,
                                                                  bos_token_id=0, initializer_range=0.2, **settings))
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    (folder / "distlm.json").write_text(json.dumps({"run": "tiny", "corpus": "stdlib", "corpus_hash": "ab12", "checkpoint": "step-000010",
                                                    "trial": None, "step": 10, "val_loss": 1.5}))
    return folder


def make_classifier(folder: Path, family: str = "llama", *, multiple: bool = False) -> Path:
    """An export folder of a classifier of ham, spam and eggs."""
    make_model(folder, FAMILIES[family])
    settings = {**FAMILIES[family]}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, vocab_size=300, eos_token_id=0, pad_token_id=0,
                                  initializer_range=0.2, id2label={0: "ham", 1: "spam", 2: "eggs"},
                                  problem_type=f"{'multi' if multiple else 'single'}_label_classification")
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder
