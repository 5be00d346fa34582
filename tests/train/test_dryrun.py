"""`micro_sequences: auto` takes the largest micro-batch that fits, and nothing that does not fit ends the job."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from distlm.errors import DistlmError, TrainError
from distlm.runs import RunFolder
from distlm.storage import Storage, read_json, write_json
from distlm.train import dryrun
from distlm.train.dryrun import choose_micro
from distlm.train.recipe import Recipe, make_recipe
from tests.records import Records
from tests.train.ranks import make_corpus, run_ranks, spec


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    given = spec(make_corpus(tmp_path / "c"), batch={"global_sequences": 48, "micro_sequences": "auto"},
                 scale={"workers": 2, "memory_gib": 4, "gpus_per_worker": 1})
    return make_recipe(given, Storage(tmp_path))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", "", {})


def launcher(folder: RunFolder, tried: list[int], fails: Callable[[int], str], gib: float = 1.0) -> Callable[[Recipe], DistlmError | None]:
    def launch(trial: Recipe) -> DistlmError | None:
        tried.append(trial.micro_sequences)
        assert trial.num_steps == 2 and trial.accumulation <= 2
        if cause := fails(trial.micro_sequences):
            return TrainError("no", cause=cause)
        for rank in range(2):
            write_json(folder.path / "dry-run" / f"{rank:05d}.json", {"bytes": round((1 + rank) * gib * 2**29)})
        return None

    return launch


def test_the_first_that_runs_from_the_largest_down_is_taken_and_kept(recipe: Recipe, folder: RunFolder) -> None:
    tried: list[int] = []
    progress = Records()
    chosen = choose_micro(recipe, folder, progress, launcher(folder, tried, lambda n: "oom" if n > 8 else ""))
    assert (tried, chosen.micro_sequences, chosen.accumulation) == ([24, 12, 8], 8, 3)
    assert replace(chosen, micro_sequences=recipe.micro_sequences) == recipe
    assert [event["message"] for event in folder.events() if "micro-batch" in event.get("message", "")] == [
        "24 sequences in a micro-batch: out of memory", "12 sequences in a micro-batch: out of memory",
        "8 sequences in a micro-batch: 1 GiB"]
    assert choose_micro(recipe, folder, progress, launcher(folder, tried, lambda n: "")).micro_sequences == 8 and len(tried) == 3
    other = replace(recipe, global_sequences=44)
    assert choose_micro(other, folder, progress, launcher(folder, tried, lambda n: "")).micro_sequences == 22, "8 does not divide 22"


def test_one_that_runs_in_more_memory_than_a_worker_has_is_not_taken(recipe: Recipe, folder: RunFolder) -> None:
    tried: list[int] = []
    with pytest.raises(TrainError, match="not one sequence of the batch fits the memory of a worker; set activation_check") as error:
        choose_micro(recipe, folder, Records(), launcher(folder, tried, lambda n: "", gib=5))
    assert tried == [24, 12, 8, 6, 4, 3, 2, 1] and error.value.cause == "oom"


def test_all_workers_together_have_the_machine_where_the_spec_says_no_limit(tmp_path: Path, recipe: Recipe, folder: RunFolder) -> None:
    tried: list[int] = []
    stated = recipe.spec.scale
    unknown = replace(recipe, spec=recipe.spec.model_copy(update={"scale": stated.model_copy(update={"memory_gib": None,
                                                                                                     "gpus_per_worker": 0})}))
    room = 3 << 30                                         # of which the two workers take one and a half times what the larger does
    with pytest.raises(TrainError, match=r"raise sharding.zero.*, or say scale.memory_gib: this machine has 3 GiB for all workers"):
        choose_micro(unknown, folder, Records(), launcher(folder, tried, lambda n: "", gib=2.1), room)
    assert choose_micro(unknown, folder, Records(), launcher(folder, tried, lambda n: "", gib=1.9), room).micro_sequences == 12
    (folder.path / "micro-sequences.json").unlink()
    assert choose_micro(recipe, folder, Records(), launcher(folder, tried, lambda n: "", gib=2.1), room).micro_sequences == 24


def test_another_failure_is_told_as_it_is(recipe: Recipe, folder: RunFolder) -> None:
    with pytest.raises(TrainError) as error:
        choose_micro(recipe, folder, Records(), launcher(folder, [], lambda n: "nonfinite_loss"))
    assert error.value.cause == "nonfinite_loss"


def test_a_worker_that_is_killed_has_not_fitted(recipe: Recipe, folder: RunFolder) -> None:
    tried: list[int] = []
    chosen = choose_micro(recipe, folder, Records(), launcher(folder, tried, lambda n: "worker_died" if n > 8 else ""))
    assert (tried, chosen.micro_sequences) == ([24, 12, 8], 8)
    assert "24 sequences in a micro-batch: a worker was killed" in [event["message"] for event in folder.events()]
    (folder.path / "micro-sequences.json").unlink()
    with pytest.raises(TrainError) as error:
        choose_micro(recipe, folder, Records(), launcher(folder, [], lambda n: "worker_died"))
    assert error.value.cause == "worker_died", "what is killed with one sequence too may be killed by something else"


def test_what_is_hopeless_by_the_estimate_is_not_tried(recipe: Recipe) -> None:
    assert [*dryrun.candidates(recipe, None)] == [24, 12, 8, 6, 4, 3, 2, 1]
    assert [*dryrun.candidates(recipe, 0)] == [1]
    on_cpu = replace(recipe, spec=recipe.spec.model_copy(update={"scale": recipe.spec.scale.model_copy(update={"gpus_per_worker": 0})}))
    assert [*dryrun.candidates(on_cpu, None)] == [12, 8, 6, 4, 3, 2, 1]
    large = replace(recipe, global_sequences=2 * 10**9)
    tried = [*dryrun.candidates(large, 4 << 30)]
    assert len(tried) < 100 and 10**9 not in tried and tried[-1] == 1, "of a worker's billion sequences divisors alone are looked at"


def test_pairs_side_by_side_are_given_room_for_what_short_rows_keep_on_a_cpu(tmp_path: Path, folder: RunFolder) -> None:
    """The heads of 8 keep probabilities of up to 32 tokens, and windows have 64."""
    corpus = make_corpus(tmp_path / "pairs", windows=(48,), context=64)
    llama = {"config": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                        "num_attention_heads": 4}}

    def made(gpus: int, objective: str) -> Recipe:
        given = spec(corpus, model=llama, batch={"global_sequences": 8, "micro_sequences": "auto"},
                     scale={"workers": 1, "memory_gib": 4, "gpus_per_worker": gpus})
        found = make_recipe(given, Storage(tmp_path))
        return replace(found, spec=found.spec.model_copy(update={"objective": objective}), mask_documents=True)

    kept = 2 * 4 * 64 * 32 * 4                             # two layers of four heads, in fp32
    more = dryrun.beyond(made(0, "dpo"), 8)
    assert 8 * kept <= more <= 1.1 * 8 * kept, "and what the allocator loses"
    assert dryrun.beyond(made(1, "dpo"), 8) == dryrun.beyond(made(0, "pretrain"), 8) == 0
    held: dict[int, int] = {}

    def launch(trial: Recipe) -> DistlmError | None:
        held[trial.micro_sequences] = trial.held
        write_json(folder.path / "dry-run" / "00000.json", {"bytes": 4 * 2**30 - more * 3 // 4 + trial.held})
        return None

    chosen = choose_micro(made(0, "dpo"), folder, Records(), launch)
    assert held == {8: more, 4: dryrun.beyond(made(0, "dpo"), 4)} and held[4] < 0.6 * more
    assert (chosen.micro_sequences, chosen.held) == (4, 0)


def test_what_a_dry_run_holds_is_in_its_peak_with_a_limit_and_without(tmp_path: Path) -> None:
    """In a process of its own: another test's peak may be far above what this one has now, as that of imports is already."""
    code = ("import sys; from pathlib import Path; from distlm.train import dryrun; before = dryrun.peak_bytes(); "
            "look = dryrun.DryRun(Path(sys.argv[1]), 0, before); [look.step() for _ in range(dryrun.STEPS)]; print(before)")
    before = int(subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True, text=True).stdout)
    assert read_json(tmp_path / "00000.json")["bytes"] > 1.1 * before, "which the machine has given"


def test_each_rank_leaves_its_peak_after_the_last_step(tmp_path: Path) -> None:
    look = dryrun.DryRun(tmp_path, 3)
    look.step()
    assert not [*tmp_path.iterdir()]
    look.step()
    assert 50e6 < read_json(tmp_path / "00003.json")["bytes"] < 50e9


def test_its_peak_has_the_copy_that_a_checkpoint_is_written_from(tmp_path: Path) -> None:
    wide = {"config": {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6,
                       "num_attention_heads": 4}}
    corpus, peaks, copied = make_corpus(tmp_path / "c"), {}, dict[bool, bool]()
    for beside in (False, True):
        run = tmp_path / f"run-{beside}"
        run_ranks({run: spec(corpus, model=wide, duration={"steps": 3}, checkpoint={"asynchronous": beside})}, dry=True)
        peaks[beside] = read_json(run / "dry-run" / "00000.json")["bytes"]
        copied[beside] = (run / "dry-run" / "checkpoint").exists()
        assert not (run / "checkpoints").exists() and not [*run.rglob("*.pt")], "nothing is saved"
    parameters = make_recipe(spec(corpus, model=wide), Storage(tmp_path)).parameters
    assert copied == {False: False, True: True} and parameters > 10e6
    assert 0.8 < (peaks[True] - peaks[False]) / (12 * parameters) < 1.3, "weights and two moments in float32"
