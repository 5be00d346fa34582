"""Small models with random weights, each with a byte-level tokenizer, as `export/` folders."""

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from distlm.model.adapter import add_adapter, base_hash, merge, save_adapter
from distlm.model.build import load_model
from distlm.model.export import export_model
from distlm.spec.adapter import Adapter

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


def make_adapter(run: Path, base: Path, *, seed: int = 1, chat: bool = False, **options: Any) -> Path:
    """The folder of a run with an adapter that changes the model much: its export, merged, and the adapter alone beside it."""
    model = load_model(base, "base", torch.float32)
    add_adapter(model, Adapter(**{"rank": 4, "alpha": 16, **options}), seed)
    torch.manual_seed(seed)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, value in weights.items():
        if "lora_B" in name:
            value.normal_(std=0.1)
        elif "magnitude" in name:
            value *= 1 + 0.3 * torch.rand_like(value)
    export = run / "export"
    lineage = {"run": run.name, "corpus": "poems", "corpus_hash": f"cd{seed}", "checkpoint": "step-000020", "trial": None, "step": 20,
               "val_loss": 1.25, "base": str(base), "base_hash": base_hash(str(base))}

    def save(place: Path) -> None:
        save_adapter(model, weights, str(base), place / "adapter")
        merge(model)

    export_model(model, None, base, export, lineage, save)
    if chat:
        tokenizer = AutoTokenizer.from_pretrained(export, local_files_only=True)
        tokenizer.chat_template = CHAT.replace("<|assistant|>", "<|poet|>")
        tokenizer.save_pretrained(export)
    return run
