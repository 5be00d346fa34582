"""A trained model as a folder that transformers and vLLM load with nothing of distlm installed."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlm.storage import write_json, writing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def export_model(model: "PreTrainedModel", weights: dict[str, "torch.Tensor"], tokenizer: Path, folder: Path,
                 lineage: dict[str, Any]) -> None:
    """Write config.json, model.safetensors, generation_config.json, the tokenizer's files and distlm.json (the lineage) to
    `folder`, which appears whole or not at all. One rank calls it."""
    from transformers import GenerationConfig

    partial = folder.with_name(f".{folder.name}.partial")
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model.save_pretrained(partial, state_dict=weights, safe_serialization=True)
        config = json.loads((partial / "config.json").read_text())
        config["use_cache"] = True                         # training turns the cache off; whoever generates wants it
        write_json(partial / "config.json", config)
        GenerationConfig(eos_token_id=config.get("eos_token_id"), bos_token_id=config.get("bos_token_id"),
                         do_sample=False).save_pretrained(partial)
        for file in tokenizer.iterdir():
            shutil.copy2(file, partial / file.name)
        write_json(partial / "distlm.json", lineage)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
