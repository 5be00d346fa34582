"""The end of a pipeline: one table of what it made, and a line to paste that tries its endpoint."""

import json
import shlex
from pathlib import Path
from typing import Any

from distlm.errors import InputError, ServeError
from distlm.progress import Progress
from distlm.runs import RunFolder
from distlm.runs.sides import lines
from distlm.serve.client import CUT, classify, query
from distlm.serve.guard import read_key

Step = tuple[str, RunFolder, dict[str, Any]]
"""(kind, folder, outputs)"""
MAX_LABELS = 5
ANSWER_S = 120
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "seed": 1}
"""A small model repeats itself where it always takes the likeliest token."""


def show(prompt: str | None, steps: dict[str, Step], progress: Progress, chat: bool = False) -> None:
    """Print the table, let every endpoint complete `prompt`, or answer it in a chat, and print a curl line. Raises ServeError where an
    endpoint does not answer."""
    rows: list[tuple[str, ...]] = []
    for step, (kind, folder, outputs) in steps.items():
        rows += [(step, *row) for row in ROWS[kind](outputs)]
        rows.append((step, "folder", str(folder.path)))
    progress.table("result", rows)
    for kind, _, outputs in steps.values():
        if kind == "serve":
            text = prompt if prompt is not None else "Once"
            found = ask(outputs, text, chat)
            progress.note(f"{outputs['model']} takes it for:\n{found}" if outputs.get("classifier") else
                          f"{outputs['model']} answers:\n{text}\n{found}" if chat else f"{outputs['model']} completes:\n{text}{found}")
            progress.note(curl(outputs, text, chat))


def show_job(kind: str, folder: RunFolder, outputs: dict[str, Any], progress: Progress) -> None:
    """Print what one job has made, where it lies, and what comes next."""
    rows: list[tuple[str, ...]] = [*ROWS[kind](outputs), ("folder", str(folder.path))]
    progress.table(folder.name, rows)
    progress.note(NEXT[kind].format(name=folder.name, best=outputs.get("best_spec", "")))


def of_corpus(made: dict[str, Any]) -> list[tuple[str, str]]:
    return [("documents", f"{made['documents']:,}"), ("bytes", f"{made['bytes']:,}"), ("tokens", f"{made['tokens']:,}")]


def of_run(made: dict[str, Any]) -> list[tuple[str, str]]:
    return [("parameters", f"{made['parameters']:,}"), ("steps", f"{made['steps']:,}, {made['tokens']:,} tokens"),
            ("loss", f"{shown(made['loss_first'])} -> {shown(made['loss_last'])}"),
            ("validation loss", f"{shown(made['val_loss_first'])} -> {shown(made['val_loss'])}" if made["val_loss"] is not None else "–"),
            *([("accuracy", shown(made["accuracy"])), ("macro F1", shown(made["f1_macro"])), ("ROC AUC", shown(made["roc_auc"]))]
              if "accuracy" in made else
              [("reward accuracy", shown(made["val_reward_accuracy"])), ("reward margin", shown(made["val_reward_margin"]))]
              if "val_reward_accuracy" in made else
              [("perplexity", shown(made["perplexity"], ",.2f")), ("bits per byte", shown(made["bits_per_byte"]))]),
            ("tokens/s", shown(made["tokens_per_s"], ",.0f")),
            *((f"{' -> '.join(sides)}: {what}", values) for sides in [made.get("sides", {})] if sides for what, values in lines(sides))]


def shown(value: float | None, form: str = ".3f") -> str:
    """A number; a dash where there is none, as without a validation split."""
    return "–" if value is None else format(value, form)


def of_sweep(made: dict[str, Any]) -> list[tuple[str, str]]:
    best = {key.removeprefix("best."): value for key, value in made.items() if key.startswith("best.")}
    ends = [trial["state"] for trial in made["trials"]]
    text = ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))
    return [("trials", f"{len(ends)}: {text}"), *([("best", ", ".join(f"{key} = {value}" for key, value in best.items()))] if best else []),
            (f"best {made['metric']}", f"{made['value']:.3f}" + (f" ± {made['std']:.3f}" if "std" in made else "")),
            *((name, f"{one['mean']:.4f} ± {one['std']:.4f} over {len(one['folds'])} folds")
              for point in made.get("points", ())[:1] for name, one in point["metrics"].items()), ("best spec", made["best_spec"])]


def of_evaluation(made: dict[str, Any]) -> list[tuple[str, str]]:
    return [*(of_windows(made) if "corpora" in made else []),
            *((name, ", ".join(f"{metric} {shown(one['value'], '.4f')}" + f" ± {shown(one['stderr'], '.4f')}" * (one["stderr"] is not None)
                               for metric, one in found["metrics"].items()) + f", {found['documents']:,} documents")
              for name, found in [*made.get("tasks", {}).items(), *made.get("groups", {}).items()] if found["metrics"])]


def of_windows(made: dict[str, Any]) -> list[tuple[str, str]]:
    parts = [(name, corpus) for name, corpus in made["corpora"].items() if len(made["corpora"]) > 1]
    parts += [(f"{name}: {source}", found) for name, corpus in made["corpora"].items() for source, found in corpus["sources"].items()
              if len(corpus["sources"]) > 1]
    if "labels" in made:
        return [("documents", f"{made['documents']:,}, {made['split']}"), ("loss", shown(made["loss"], ".4f")),
                ("accuracy", shown(made["accuracy"], ".2%")), ("macro F1", shown(made["f1_macro"], ".4f")),
                ("ROC AUC", shown(made["roc_auc"], ".4f")),
                *([] if made["multiple_labels"] else [("calibration error", shown(made["ece"], ".2%"))]),
                *((name, f"loss {shown(found['loss'], '.4f')}, accuracy {shown(found['accuracy'], '.2%')}, "
                         f"{found['documents']:,} documents") for name, found in parts)]
    return [("tokens", f"{made['tokens']:,} of {made['windows']:,} windows, {made['split']}"), ("loss", shown(made["loss"], ".4f")),
            ("perplexity", shown(made["perplexity"], ",.2f")), ("bits per byte", shown(made["bits_per_byte"], ".4f")),
            ("accuracy", shown(made["accuracy"], ".2%")), ("calibration error", shown(made["ece"], ".2%")),
            *((name, f"loss {shown(found['loss'], '.4f')}, {found['tokens']:,} tokens") for name, found in parts)]


def of_average(made: dict[str, Any]) -> list[tuple[str, str]]:
    return [("averaged", f"{made['averaged']} of {len(made['models'])} models, {made['method']}"), ("loss", shown(made["loss"], ".4f")),
            *((one["model"], f"loss {shown(one['loss'], '.4f')}, {'taken' if one['taken'] else 'left out'}") for one in made["models"]),
            *([("macro F1", shown(made["f1_macro"], ".4f"))] if "labels" in made else
              [("perplexity", shown(made["perplexity"], ",.2f")), ("bits per byte", shown(made["bits_per_byte"], ".4f"))]),
            ("accuracy", shown(made["accuracy"], ".2%"))]


def of_compression(made: dict[str, Any]) -> list[tuple[str, str]]:
    from distlm.compress.report import described, sides_of

    return [("method", described(made["compression"])), *lines(sides_of(made))]


def of_endpoint(made: dict[str, Any]) -> list[tuple[str, str]]:
    adapters = [("adapters", ", ".join(made["adapters"]))] if made.get("adapters") else []
    return [("url", made["url"]), ("key file", made["api_key_file"]), *adapters]


def ask(made: dict[str, Any], prompt: str, chat: bool = False) -> str:
    """What the endpoint adds to `prompt`, what it answers in a chat, or which labels it has for it. Raises ServeError."""
    try:
        key = read_key(Path(made["api_key_file"]))
        if not made.get("classifier"):
            return "".join(query(made["url"], key, prompt, model=made["model"], chat=chat, timeout_s=ANSWER_S, **SAMPLING))
        [found] = classify(made["url"], key, [prompt], model=made["model"], timeout_s=ANSWER_S)
        chances = found["probabilities"]
        told = ", ".join(f"{name} {chances[name]:.3f}" for name in sorted(chances, key=lambda name: -chances[name])[:MAX_LABELS])
        return told + f"\n({CUT})" * found["truncated"]
    except (ServeError, InputError, ValueError, KeyError) as error:
        what = "classify a text" if made.get("classifier") else "complete a prompt"
        raise ServeError(f"the endpoint did not {what}: {error}", where=made["url"],
                         remedy="logs/ in its folder say more") from None


def curl(made: dict[str, Any], prompt: str, chat: bool = False) -> str:
    """A line for a shell that asks the endpoint for the same."""
    asked: dict[str, Any] = {"input": prompt} if made.get("classifier") else {**(
        {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}), **SAMPLING}
    path = "classify" if made.get("classifier") else "chat/completions" if chat else "completions"
    base = made["url"].rstrip("/").removesuffix("/v1")
    return (f'curl {base}/v1/{path} -H "Authorization: Bearer $(cat {shlex.quote(made["api_key_file"])})" '
            f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps({'model': made['model'], **asked}))}")


ROWS = {"prepare": of_corpus, "train": of_run, "tune": of_sweep, "average": of_average, "evaluate": of_evaluation,
        "compress": of_compression, "serve": of_endpoint}
NEXT = {"prepare": "train on it with `corpus: {name}`; `distlm corpus inspect {name}` shows what it holds",
        "train": "serve it with `kind: serve` and `model: {name}`; its export is what transformers loads",
        "tune": "`distlm run {best}` trains the best one on; `distlm dashboard {name}` shows all side by side",
        "average": "serve it with `kind: serve` and `model: {name}`; report.html in its folder has the loss of each model",
        "evaluate": "report.html in its folder has a table of every source and task, the calibration and the samples",
        "compress": "serve it with `kind: serve` and `model: {name}`, measure it with `kind: evaluate`; report.html has both side by side",
        "serve": "`distlm query {name} PROMPT` asks it, `distlm stop {name}` ends it"}
"""Kind -> what a user may do now."""
