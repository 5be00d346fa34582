"""Tokens per second of the engine with 1 and 8 requests at a time, beside `generate` of the same model at batch 1; and with 8 requests for
one adapter, and for the model and 4 adapters of it in turn.

    python benchmarks/serve.py [--tokens 128] [--prompt 64] [--threads 1] [--repeats 3] [--rank 16]
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from distlm.model.adapter import add_adapter, save_adapter
from distlm.model.build import load_model
from distlm.serve.engine import Request
from distlm.serve.torch_engine import TorchEngine
from distlm.spec.adapter import Adapter
from distlm.spec.presets import PRESETS

VOCABULARY, CONTEXT = 8192, 512
ADAPTERS = ("a", "b", "c", "d")


def make_model(folder: str, preset: str) -> None:
    """Random weights and no end token, so that every completion has its full length; a byte-level tokenizer."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(sorted(alphabet))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    settings = dict(PRESETS[preset])
    config = AutoConfig.for_model(settings.pop("model_type"), vocab_size=VOCABULARY, max_position_embeddings=CONTEXT,
                                  eos_token_id=None, bos_token_id=None, pad_token_id=None, **settings)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    print(f"{preset}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


def make_adapters(folder: str, places: Path, rank: int) -> dict[str, Path]:
    """Adapters of every linear layer, as peft writes them."""
    for name in ADAPTERS:
        model = load_model(folder, folder, torch.float32)
        add_adapter(model, Adapter(rank=rank), seed=0)
        weights = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
        save_adapter(model, weights, folder, places / name)
    print(f"{len(ADAPTERS)} adapters of rank {rank}: {sum(value.numel() for value in weights.values()) / 1e6:.1f} M parameters each")
    return {name: places / name for name in ADAPTERS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-10m", choices=[name for name, shape in PRESETS.items() if "hidden_size" in shape])
    for name, value in {"--tokens": 128, "--prompt": 64, "--threads": 1, "--repeats": 3, "--rank": 16}.items():
        parser.add_argument(name, type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(0, 256, (options.prompt,), generator=generator).tolist()) for _ in range(8)]

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as places:
        torch.manual_seed(0)
        make_model(folder, options.preset)
        engine = TorchEngine(folder, threads=options.threads)
        adapted = TorchEngine(folder, threads=options.threads, adapters=make_adapters(folder, Path(places), options.rank))
        model = engine.model

        def generate() -> int:
            ids = torch.tensor([prompts[0]], device=engine.device)
            with torch.inference_mode():
                model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=options.tokens)
            return options.tokens

        def serve(num_requests: int, server: TorchEngine = engine, names: tuple[str, ...] = ("",)) -> Callable[[], int]:
            async def one(prompt: tuple[int, ...], adapter: str) -> int:
                request = Request(prompt, options.tokens, adapter=adapter)
                return sum([len(chunk.ids) async for _, chunk in server.generate([request])])

            async def everyone() -> int:
                return sum(await asyncio.gather(*(one(prompt, names[i % len(names)]) for i, prompt in enumerate(prompts[:num_requests]))))

            return lambda: asyncio.run(everyone())

        sides = {"generate, batch 1": generate, "engine, 1 request": serve(1), "engine, 8 requests": serve(8),
                 "engine, 8 for 1 adapter": serve(8, adapted, ADAPTERS[:1]), "engine, 8 for 4 and none": serve(8, adapted, ("", *ADAPTERS))}
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(options.repeats + 1):          # taking turns, so that a slow spell of the machine meets all; the first warms up
            for name, side in sides.items():
                start = time.perf_counter()
                tokens = side()
                if repeat:
                    speeds[name].append(tokens / (time.perf_counter() - start))
        engine.close()
        adapted.close()

    print(f"{engine.device}, {model.dtype}, {options.threads} threads, prompt {options.prompt}, {options.tokens} tokens each, "
          f"{options.repeats} repeats")
    base = statistics.median(speeds["generate, batch 1"])
    print(f"{'':25} {'tokens/s':>9} {'min':>8} {'max':>8} {'ratio':>6}")
    for name, values in speeds.items():
        median = statistics.median(values)
        print(f"{name:25} {median:9.1f} {min(values):8.1f} {max(values):8.1f} {median / base:6.2f}")


if __name__ == "__main__":
    main()
