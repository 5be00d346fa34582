"""What a test does to the ranks of `ranks.py`, in their processes: faults that fire at a place, and watches that tell what was inside."""

import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.train.ranks import VOCABULARY


def add_poison(model: Any, window: int, module: str, gradient: bool = False, factor: float = math.nan) -> None:
    """Let the output of a module, or the gradient with respect to it, be multiplied by `factor` whenever the model reads a window. Hooks
    would not be called where a layer is compiled, and a factor that is no tensor not be looked at again."""
    import torch

    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(by)
            return value.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            return gradient * ctx.saved_tensors[0], None

    now = torch.ones(())

    def read(_: Any, args: Any, kwargs: Any) -> None:
        rows = kwargs["input_ids"]
        now.fill_(factor if (rows[:, 0] * VOCABULARY + rows[:, 1] == window).any() else 1)

    def spoiled(*args: Any, **more: Any) -> Any:
        output = forward(*args, **more)
        return Times.apply(output, now) if gradient else output * now

    model.register_forward_pre_hook(read, with_kwargs=True)
    poisoned = model.get_submodule(module)
    forward, poisoned.forward = poisoned.forward, spoiled


def watch_poisoned(poison: dict[str, Any]) -> Callable[[Exception], None]:
    """Poison the models that are built from here on. Returns what is called with the error that a run ended with: it prints that, and
    whether the masters are the ones from before the step."""
    from distlm.train import loop
    from distlm.train import model as trained
    from distlm.train.average import masters

    make, train = loop.make_engine, loop.train_step
    state, rank = dict[str, Any](), os.environ["RANK"]

    def poisoned(build: Callable[..., Any]) -> Callable[..., Any]:
        def built(*args: Any) -> Any:
            model = build(*args)
            add_poison(model, **poison)
            return model

        return built

    def made(*args: Any) -> Any:
        state["engine"] = make(*args)
        return state["engine"]

    def step(engine: Any, *args: Any) -> Any:
        state["before"] = [part.detach().clone() for part in masters(engine)]
        result = train(engine, *args)
        if result.limit is not None:
            print(f"rank {rank} spike at step {args[3] + 1}: {weights()}")
        return result

    def weights() -> str:
        before = state.get("before", [])                   # none before the first step
        same = not before or all(torch.equal(*pair) for pair in zip(before, masters(state["engine"]), strict=True))
        return f"weights {'kept' if same else 'changed'}"

    def report(error: Exception) -> None:
        print(f"rank {rank} ended: {error} [{getattr(error, 'cause', '')}], {weights()}")

    import torch

    trained.build_model, trained.blank_model = poisoned(trained.build_model), poisoned(trained.blank_model)
    loop.make_engine, loop.train_step = made, step
    return report


def watch_base() -> Callable[[], str]:
    """Returns what says of the last run in which precisions its model was loaded and its base is held, whether what this rank holds of that
    is to the bit as it was when DeepSpeed had taken it, scales too, and how many parameters the optimizer has on this rank."""
    import torch

    from distlm.train import loop
    from distlm.train import model as trained
    from distlm.train.average import masters

    build, make, state = trained.build_model, loop.make_engine, dict[str, Any]()

    def built(*args: Any) -> Any:
        model = build(*args)
        state["loaded"] = {str(one.dtype) for one in model.parameters()}
        return model

    def made(*args: Any) -> Any:
        state["engine"] = make(*args)
        state["before"] = frozen()
        return state["engine"]

    def frozen() -> list[torch.Tensor]:
        base = [one for one in state["engine"].module.parameters() if not one.requires_grad]
        scales = [one.quant_state for one in base if getattr(one, "quant_state", None)]
        held = [getattr(one, "ds_tensor", one) for one in base]              # stage 3 has a part of it
        assert all(one.numel() for one in held)
        return [one.detach().clone() for one in [*held, *(scale.absmax for scale in scales), *(scale.state2.absmax for scale in scales)]]

    def report() -> str:
        same = all(torch.equal(*pair) for pair in zip(state["before"], frozen(), strict=True))
        trained = sum(one.numel() for one in masters(state["engine"]))
        held = {str(one.dtype) for one in state["engine"].module.parameters() if not one.requires_grad}
        return f"loaded {sorted(state['loaded'])} held {sorted(held)} {'kept' if same else 'changed'}, {trained} in the optimizer"

    trained.build_model, loop.make_engine = built, made
    return report


def watch_start() -> None:
    """Let this rank print of each run how many parameters its model has as DeepSpeed's engine is made, in which precisions, how many are
    whole, and what part of all elements it holds; and let what it has not drawn be no number."""
    import deepspeed
    import torch

    from distlm.train import model as trained

    initialize, blank, rank = deepspeed.initialize, trained.blank_model, os.environ["RANK"]

    def made(*, model: Any, **more: Any) -> Any:
        all_of_it = [*model.parameters()]
        whole = sum(not hasattr(one, "ds_id") or one.numel() > 0 for one in all_of_it)
        held = sum(one.numel() + (one.ds_tensor.numel() if hasattr(one, "ds_id") else 0) for one in all_of_it)
        total = sum(getattr(one, "ds_numel", one.numel()) for one in all_of_it)
        precisions = sorted({str(one.dtype) for one in all_of_it})
        print(f"rank {rank}: {len(all_of_it)} parameters in {precisions}, {whole} whole, {held / total:.2f} held", flush=True)
        return initialize(model=model, **more)

    def blanked(*args: Any) -> Any:
        model = blank(*args)
        with torch.no_grad():
            for one in model.parameters():
                one.fill_(math.nan)
        print(f"rank {rank}: not drawn", flush=True)
        return model

    deepspeed.initialize, trained.blank_model = made, blanked


def strike(what: signal.Signals, place: str, number: int) -> None:
    """Let this rank be sent a signal as the `number`-th step begins its arithmetic ("step"), as the evaluation after it begins ("measure"),
    the save ("save") or the export ("export"), or when the first file of the checkpoint is written ("write")."""
    from distlm.train import loop, saver
    from distlm.train.evaluate import Evaluator

    owner, name, step_of = {
        "step": (loop, "train_step", lambda engine, *_: engine.global_steps + 1),
        "measure": (Evaluator, "measure", lambda _, engine, *__: engine.global_steps),
        "save": (saver.Saver, "save", lambda _, step, *__: step),
        "write": (saver, "_write", lambda *args: int(args[-1].name.removeprefix("step-"))),
        "export": (loop, "gather_weights", lambda engine, *_: engine.global_steps)}[place]
    call = getattr(owner, name)

    def called(*args: Any, **more: Any) -> Any:
        made = call(*args, **more) if place == "write" else None
        if step_of(*args) == number:
            os.kill(os.getpid(), what)
        return made or call(*args, **more)

    setattr(owner, name, called)


def block_save(step: int) -> None:
    """Let the write of this rank's files of a step's checkpoint never return, though its other threads go on. An exchange may take seconds,
    on all ranks."""
    from distlm.train import checkpoint, watchdog

    watchdog.EXCHANGE_S = 24
    if os.environ["RANK"] == "0":
        return
    print(f"process of rank {os.environ['RANK']}", flush=True)
    entry = checkpoint.entry

    def entered(file: Path, root: Path) -> dict[str, Any]:
        if root.name == f"step-{step:06d}":
            os.mkfifo(pipe := file.with_suffix(".pipe"))
            os.close(os.open(pipe, os.O_WRONLY))           # which nobody reads
        return entry(file, root)

    checkpoint.entry = entered


def watch_rests() -> None:
    """Let this rank print in which phase of what follows a step it does what, once how many groups there are and what seconds their
    exchanges may take, and whether `preload` was there before."""
    import torch
    from torch.distributed import distributed_c10d

    from distlm.train import loop
    from distlm.train.evaluate import Evaluator
    from distlm.train.metrics import MetricsWriter
    from distlm.train.saver import Saver
    from distlm.train.watchdog import Watchdog

    rank, phases, rest, begin = os.environ["RANK"], [""], Watchdog.rest, Watchdog.__enter__
    print(f"rank {rank}: preloaded {'tests.train.preload' in sys.modules}", flush=True)

    def rested(dog: Watchdog, step: int, phase: Any = "") -> None:
        phases.append(phase)
        rest(dog, step, phase)

    def entered(dog: Watchdog) -> Watchdog:
        groups: list[Any] = list(distributed_c10d._world.pg_map)
        seconds = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}
        print(f"rank {rank}: {len(groups)} groups, {sorted(seconds)}", flush=True)
        return begin(dog)

    def told(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def called(*args: Any, **more: Any) -> Any:
            print(f"rank {rank}: {name} in {phases[-1]!r}", flush=True)
            return call(*args, **more)

        return called

    for owner, name, put in ((Watchdog, "rest", rested), (Watchdog, "__enter__", entered)):
        setattr(owner, name, put)
    for place, name in ((loop, "lacks_evaluation"), (Evaluator, "measure"), (MetricsWriter, "start"), (MetricsWriter, "step"),
                        (Saver, "save"), (Saver, "commit")):
        setattr(place, name, told(getattr(place, name), name))


def watch_gradients() -> Callable[[Path], None]:
    """Returns what writes `gradients.pt` to the folder of the run that was the last one: of each of its steps the loss, the norm, how many
    tokens gave loss, and the gradient that the update was given, whole, by parameters as the model names them. All ranks take part."""
    import torch
    from deepspeed.utils import safe_get_full_grad

    from distlm.model.tensor import dimension
    from distlm.train import loop
    from distlm.train.zero import gather_parts

    update, train, found, gradients = loop.update, loop.train_step, list[dict[str, Any]](), dict[str, torch.Tensor]()

    def updated(engine: Any, *args: Any) -> bool:
        for name, parameter in engine.module.model.named_parameters():
            part = safe_get_full_grad(parameter).detach().float()
            dim = dimension(name) if engine.autotp_size() > 1 else None
            gradients[name] = part.clone() if dim is None else gather_parts(part, dim)
        return update(engine, *args)

    def trained(*args: Any) -> Any:
        result = train(*args)
        found.append({"loss": result.loss, "norm": result.norm, "targets": result.num_targets, "gradients": dict(gradients)})
        return result

    def write(run: Path) -> None:
        if os.environ["RANK"] == "0":
            torch.save(found, run / "gradients.pt")
        found.clear()

    loop.update, loop.train_step = updated, trained
    return write


def hold_writes(step: int, released: threading.Event) -> None:
    """Let the thread that writes a step's checkpoint wait."""
    from distlm.train import saver

    write = saver._write

    def held(*args: Any) -> Any:
        if args[-1].name == f"step-{step:06d}":
            released.wait()
        return write(*args)

    saver._write = held


READ = "before distlm/train/loop.py:train_step tolist"
"""The one read of a step, as `watch_waits` names it."""


def watch_waits() -> None:
    """Let this rank print of each step "waits: " and JSON of what would wait for a GPU and how often, before the loop's own read and after
    it: the innermost function that is not PyTorch's, and what it does, a copy of a number to the device among it, for which PyTorch waits.

    A batch is on the host and may be asked; CPU attention is not there on a GPU. Numbers that torch.tensor has made without a device are on
    the host, with all that is made of them alone."""
    import json
    from collections import Counter

    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.weak import WeakIdKeyDictionary

    from distlm.train import loop

    asked, train, aten = Counter[str](), loop.train_step, torch.ops.aten
    loop_code = train.__code__
    on_host: Any = WeakIdKeyDictionary()

    def note(what: str, tensors: list[torch.Tensor]) -> None:
        frame, calls = sys._getframe(2), []
        while frame is not None and frame.f_code is not loop_code:
            calls.append((frame.f_code.co_filename, frame.f_code.co_name))
            frame = frame.f_back  # type: ignore[assignment]
        calls.append((loop_code.co_filename, loop_code.co_name))
        ours = [(file, name) for file, name in calls if "/torch/" not in file and file != __file__]
        file, name = ours[0]
        if (tensors and all(one in on_host for one in tensors)) or file.endswith(("train/batch.py", "model/attention.py")) \
                or any(name == "inputs" for _, name in ours):
            return
        place = file.split("site-packages/")[-1] if "site-packages" in file else file[file.rindex("distlm/"):]
        asked[f"{'after' if READ in asked else 'before'} {place}:{name} {what}"] += 1

    class Python(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            name = getattr(function, "__name__", "")
            if name in ("tolist", "cpu", "numpy"):
                note(name, [args[0]])
            elif function is torch.tensor:
                if (kwargs or {}).get("device") is None:
                    on_host[made] = True
                else:
                    note("copy", [])
            return made

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
            packet = operator.overloadpacket
            masked = packet in (aten.index, aten.index_put, aten.index_put_) and any(one.dtype == torch.bool for one in given[1:])
            if packet in (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.equal) or masked:
                note(packet.__name__.strip("_"), given)
            made = operator(*args, **(kwargs or {}))
            if given and all(one in on_host for one in given):
                for one in tree_leaves(made):
                    if isinstance(one, torch.Tensor):
                        on_host[one] = True
            return made

    def watched(*args: Any) -> Any:
        asked.clear()
        with Python(), Operators():
            result = train(*args)
        print(f"waits: {json.dumps(asked)}", flush=True)
        return result

    loop.train_step = watched
