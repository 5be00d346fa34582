"""The engine against `generate` of the same model, alone and in company."""

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from distlm.errors import InputError, ServeError
from distlm.serve.engine import Chunk, EngineFailed, EngineFull, NoMemory, Request
from distlm.serve.slots import SlotCache
from distlm.serve.torch_engine import TorchEngine
from tests.serve.tiny_models import FAMILIES, make_model


@pytest.fixture
def engine(llama: Path):
    engine = TorchEngine(llama, max_sequences=4, max_queued=2, threads=1)
    yield engine
    engine.close()


def prompts(number: int, vocabulary: int = 300, seed: int = 1) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(1, vocabulary, (3 + 7 * i % 23,), generator=generator).tolist()) for i in range(number)]


def reference(folder: Path, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens,
                              pad_token_id=0)[0, len(prompt):].tolist()


async def collect(engine: TorchEngine, *requests: Request) -> list[list[Chunk]]:
    chunks: list[list[Chunk]] = [[] for _ in requests]
    async for index, chunk in engine.generate(requests):
        chunks[index].append(chunk)
    return chunks


def ids(chunks: list[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.ids]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    weights = make_model(tmp_path, FAMILIES["llama"]) / "model.safetensors"
    kept = {name: value for name, value in load_file(weights).items() if name != "model.norm.weight"}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model: .* has no weights for model.norm.weight; copy the checkpoint again"):
        TorchEngine(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate_alone_and_in_company(family: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, FAMILIES[family])
    engine = TorchEngine(folder, max_sequences=3, threads=1)
    wanted = {prompt: reference(folder, prompt, 24) for prompt in prompts(7)}
    assert len({tuple(tokens) for tokens in wanted.values()}) > 3, "the model must depend on its prompt"

    async def all_joining() -> dict[tuple[int, ...], list[int]]:
        async def later(delay_steps: int, prompt: tuple[int, ...]) -> tuple[tuple[int, ...], list[int]]:
            started = engine.metrics.generation_tokens._value.get()
            await until(lambda: engine.metrics.generation_tokens._value.get() >= started + delay_steps)
            return prompt, ids((await collect(engine, Request(prompt, 24)))[0])
        return dict(await asyncio.gather(*(later(3 * i, prompt) for i, prompt in enumerate(wanted))))

    try:
        assert {p: ids(run(collect(engine, Request(p, 24)))[0]) for p in wanted} == wanted
        assert run(all_joining()) == wanted
    finally:
        engine.close()


def test_sequences_really_decode_together(engine: TorchEngine) -> None:
    rows = []
    forward = engine.model.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        rows.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    engine.model.forward = spy
    run(collect(engine, *(Request(prompt, 10) for prompt in prompts(4))))
    assert (4, 1) in rows and max(shape[0] for shape in rows if shape[1] > 1) == 1


def test_a_seed_gives_the_same_text_whatever_runs_beside_it(engine: TorchEngine) -> None:
    first, *others = prompts(4)
    wish = Request(first, 20, temperature=0.9, top_p=0.9, seed=7)
    alone = run(collect(engine, wish))[0]
    among = run(collect(engine, *(Request(p, 12, temperature=1.0) for p in others), wish))[3]
    assert ids(alone) == ids(among)
    assert ids(run(collect(engine, Request(first, 20, temperature=0.9, top_p=0.9, seed=8)))[0]) != ids(alone)


def test_top_p_near_zero_is_greedy(engine: TorchEngine) -> None:
    prompt = prompts(1)[0]
    greedy = ids(run(collect(engine, Request(prompt, 10)))[0])
    assert ids(run(collect(engine, Request(prompt, 10, temperature=2.0, top_p=1e-6)))[0]) == greedy
    assert ids(run(collect(engine, Request(prompt, 10, temperature=2.0, top_p=0.0)))[0]) == greedy


def test_logprobs_are_those_of_a_plain_forward_pass(engine: TorchEngine) -> None:
    prompt = prompts(2)[1]
    chunks = run(collect(engine, Request(prompt, 5, logprobs=2, echo=True)))[0]
    tokens = [token for chunk in chunks for token in chunk.tokens]
    everything = [*prompt, *ids(chunks)]
    assert [token.id for token in tokens] == everything and tokens[0].logprob is None
    with torch.inference_mode():
        logprobs = engine.model(torch.tensor([everything])).logits[0].log_softmax(-1)
    for place, token in enumerate(tokens[1:]):
        assert token.logprob == pytest.approx(float(logprobs[place, token.id]), abs=1e-4)
        assert [best for best, _ in token.top] == logprobs[place].topk(2).indices.tolist()


def test_a_prompt_is_scored_without_generating(engine: TorchEngine) -> None:
    prompt = prompts(2)[1]
    (chunk,) = run(collect(engine, Request(prompt, 0, logprobs=0, echo=True)))[0]
    assert chunk.ids == () and len(chunk.tokens) == len(prompt) and chunk.finish_reason == "length"


def test_a_full_queue_refuses_and_cancelling_frees_the_places(engine: TorchEngine) -> None:
    long = Request(prompts(1)[0], 100)

    async def work() -> None:
        running = [engine.generate([long]) for _ in range(4)]
        for stream in running:
            await anext(stream)
        waiting = [engine.generate([long]) for _ in range(2)]
        with pytest.raises(EngineFull):
            engine.generate([long])
        del waiting                                        # dropped, not closed: must count as cancelled too
        for stream in running:
            await stream.aclose()
        await until(lambda: not engine._active and not engine._waiting)
        assert len(ids((await collect(engine, Request(prompts(1)[0], 3)))[0])) == 3

    run(work())
    text = engine.metrics.text().decode()
    assert 'finished_reason="abort"' in text and "vllm:num_requests_running{" in text
    assert engine.cache.lengths == []


def test_a_dead_engine_fails_pending_and_new_requests_and_its_health(engine: TorchEngine) -> None:
    async def work() -> None:
        stream = engine.generate([Request(prompts(1)[0], 100)])
        await anext(stream)

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no more memory")

        engine.model.forward = broken
        with pytest.raises(EngineFailed, match="no more memory"):
            async for _ in stream:
                pass
        with pytest.raises(EngineFailed):
            engine.generate([Request(prompts(1)[0], 1)])
        with pytest.raises(EngineFailed):
            engine.check()

    run(work())


def on_gpu(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def on_host(*_: Any) -> None:
    torch.empty(1 << 50)


@pytest.mark.parametrize("fail", [on_gpu, on_host])
@pytest.mark.parametrize("place", ["forward", "keys", "values"])
def test_a_request_that_there_is_no_memory_for_fails_alone(fail: Any, place: str, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
                                                           ) -> None:
    small, big = prompts(2), tuple(range(1, 101))
    wanted = [ids(run(collect(engine, Request(prompt, 20)))[0]) for prompt in (*small, big)]
    cache = engine.cache = SlotCache(len(engine.cache.slots), 4, engine.context)
    forward, layer, left = engine.model.forward, cache.slots[-1], [1]

    def short(tokens: int, wide: int) -> None:
        if left[0] and tokens >= wide:
            left[0] -= 1
            fail()

    def limited(*args: Any, **given: Any) -> Any:
        short(given["input_ids"].shape[1], 100)
        return forward(*args, **given)

    class Narrow(torch.Tensor):
        """Keys or values that there is once no memory to make wider."""

        def new_zeros(self, *shape: int) -> Any:           # type: ignore[override]
            short(shape[2], 100)
            return self.as_subclass(torch.Tensor).new_zeros(*shape)

    if place == "forward":
        monkeypatch.setattr(engine.model, "forward", limited)

    async def work() -> None:
        beside = [engine.generate([Request(prompt, 20)]) for prompt in small]
        heads = [(await anext(stream))[1] for stream in beside]
        if place != "forward":
            setattr(layer, place, getattr(layer, place).as_subclass(Narrow))
        with pytest.raises(NoMemory, match=r"no memory for a prompt of 100 tokens beside the \d sequences .*; shorten it"):
            async for _ in engine.generate([Request(big, 20), Request(small[0], 100), Request(small[1], 100)]):
                pass
        for stream, head, expected in zip(beside, heads, wanted, strict=False):
            assert ids([head, *[chunk async for _, chunk in stream]]) == expected
        await until(lambda: not engine._active and not engine._waiting)
        engine.check()
        assert left == [0] and ids((await collect(engine, Request(big, 20)))[0]) == wanted[2]

    run(work())
    assert engine.cache.lengths == []


def test_a_completion_can_fill_the_context_to_its_last_token(engine: TorchEngine) -> None:
    prompt = prompts(4)[3]
    engine.ends = frozenset()
    chunks = run(collect(engine, Request(prompt, 128 - len(prompt))))[0]
    assert len(prompt) + len(ids(chunks)) == 128 and chunks[-1].finish_reason == "length"


def test_a_family_that_cannot_be_decoded_in_slots_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path, {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4})
    with pytest.raises(ServeError, match="mamba"):
        TorchEngine(folder)


def test_an_answer_is_not_delayed_by_an_idle_engine(engine: TorchEngine) -> None:
    run(collect(engine, Request(prompts(1)[0], 1)))
    time.sleep(0.05)
    start = time.monotonic()
    run(collect(engine, Request(prompts(1)[0], 1)))
    assert time.monotonic() - start < 1
