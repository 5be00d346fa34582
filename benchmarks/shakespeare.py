"""nanoGPT's recipe for a CPU beside `distlm run` of jobs/shakespeare.yaml: the same text, split, tokens seen, threads and machine, in one
run. Validation loss in nats per character, and the time from the first step's beginning to the last step's end, evaluations included.

    python benchmarks/shakespeare.py ../tinyshakespeare.txt
    python benchmarks/shakespeare.py ../tinyshakespeare.txt --steps 50          # does it work

The recipe (github.com/karpathy/nanoGPT, config/train_shakespeare_char.py as its README sets it for a CPU): 4 layers, 4 heads, width 128,
64 characters of context, 12 random blocks a step, AdamW with betas 0.9 and 0.99, 1e-3 falling to 1e-4 as a cosine after 100 steps,
2,000 steps, fp32, no dropout.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONTEXT, SEQUENCES, WIDTH, LAYERS, HEADS = 64, 12, 128, 4, 4
JOB = Path(__file__).parent.parent / "jobs" / "shakespeare.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("text", type=Path, nargs="?", help="tinyshakespeare, a file of 1,115,394 characters")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=["recipe", "distlm"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.text is None:
        print("left out: it reads a file that is not in this repository; name it, python benchmarks/shakespeare.py tinyshakespeare.txt")
        return
    if options.side:
        loss, seconds = run_recipe(options) if options.side == "recipe" else run_distlm(options)
        print(json.dumps([loss, seconds]))
        return
    found = {side: measure(side, options) for side in ("recipe", "distlm")}
    print(f"{options.steps:,} steps of {CONTEXT * SEQUENCES} characters, {options.threads} threads")
    print(f"{'':18} {'val loss':>9} {'seconds':>9} {'tokens/s':>9}")
    for side, (loss, seconds) in found.items():
        name = "nanoGPT's recipe" if side == "recipe" else "distlm run"
        print(f"{name:18} {loss:9.4f} {seconds:9.1f} {options.steps * CONTEXT * SEQUENCES / seconds:9,.0f}")
    print(f"distlm takes {found['distlm'][1] / found['recipe'][1]:.2f} of the recipe's time")


def measure(side: str, options: argparse.Namespace) -> tuple[float, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__, str(options.text.resolve()), f"--steps={options.steps}",
                           f"--threads={options.threads}", f"--side={side}"], env=environment, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    loss, seconds = json.loads(done.stdout.splitlines()[-1])
    return loss, seconds


def halves(path: Path) -> tuple[str, str]:
    """The first 90 % of the characters, for training, and the rest."""
    text = path.read_text()
    return text[:int(0.9 * len(text))], text[int(0.9 * len(text)):]


def run_recipe(options: argparse.Namespace) -> tuple[float, float]:
    """(Loss over the whole of the validation text in blocks, seconds)."""
    import torch
    from torch.nn import functional

    torch.manual_seed(1337)
    torch.set_num_threads(options.threads)
    train, val = halves(options.text)
    codes = {character: i for i, character in enumerate(sorted(set(train + val)))}
    tokens, held_out = (torch.tensor([codes[c] for c in part]) for part in (train, val))
    model = make_model(len(codes))
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-3,
                                  betas=(0.9, 0.99), fused=True)

    def some(source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(source) - CONTEXT, (SEQUENCES,)).tolist()
        return (torch.stack([source[i:i + CONTEXT] for i in starts]), torch.stack([source[i + 1:i + 1 + CONTEXT] for i in starts]))

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(model(x).flatten(0, 1), y.flatten())

    def estimate() -> None:
        """nanoGPT looks at 20 batches of each split, every 250 steps."""
        with torch.no_grad():
            for _ in range(20):
                loss_of(*some(tokens))
                loss_of(*some(held_out))

    started = time.perf_counter()
    for step in range(options.steps):
        if step % 250 == 0:
            estimate()
        progress = max(0, step - 100) / max(1, options.steps - 100)
        rate = 1e-3 * step / 100 if step < 100 else 1e-4 + 0.5 * (1 + math.cos(math.pi * progress)) * 9e-4
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(*some(tokens))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    count = (len(held_out) - 1) // CONTEXT
    x, y = (held_out[i:i + count * CONTEXT].view(count, CONTEXT) for i in (0, 1))
    with torch.no_grad():
        return loss_of(x, y).item(), seconds


def make_model(vocabulary: int) -> Any:
    """A GPT-2 without biases, input and output embeddings tied."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.norm_mlp = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).split(WIDTH, dim=-1)]
            attended = functional.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + self.out(attended.transpose(1, 2).flatten(2))
            return x + self.down(functional.gelu(self.up(self.norm_mlp(x))))

    class Gpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
            self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(WIDTH, bias=False)
            for name, parameter in self.named_parameters():
                if parameter.dim() >= 2:
                    nn.init.normal_(parameter, std=0.02 / (2 * LAYERS) ** 0.5 if name.endswith(("out.weight", "down.weight")) else 0.02)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.tokens(x) + self.positions.weight[:x.shape[1]]
            return self.norm(self.blocks(hidden)) @ self.tokens.weight.T

    return Gpt()


def run_distlm(options: argparse.Namespace) -> tuple[float, float]:
    """The job file as it stands, over the two halves of the text: (loss over all validation windows, seconds)."""
    import distlm
    from distlm.progress import Progress

    with tempfile.TemporaryDirectory(prefix="distlm-bench-") as folder:
        for name, part in zip(("train.txt", "val.txt"), halves(options.text), strict=True):
            (Path(folder) / name).write_text(part)
        os.chdir(folder)
        settings = [f"steps.train.duration.steps={options.steps}", f"steps.train.scale.threads_per_worker={options.threads}",
                    "steps.train.evaluate.max_windows=100000",
                    *([f"steps.train.schedule.warmup_steps={options.steps // 10}"] if options.steps < 500 else [])]
        outputs = distlm.run(JOB, overrides=settings, storage=folder, progress=Progress())
        run = distlm.load_run(outputs["train"], storage=folder)
        records = run.read_metrics()
        first = next(record for record in records if "loss" in record)
        seconds = records[-1]["time"] - first["time"] + CONTEXT * SEQUENCES / first["tokens_per_s"]
        return records[-1]["val_loss"], seconds


if __name__ == "__main__":
    main()
