"""A mistake in a spec is one line that says where, what, the rule and the remedy; a right spec knows where each value came from."""

from pathlib import Path

import pytest

from distlm.errors import SpecError
from distlm.spec import KINDS, load_spec
from distlm.spec.batch import Batch, check_batch
from distlm.spec.load import dump, to_yaml, validate

TRAIN = "kind: train\nname: a\ncorpus: c\nmodel: {preset: llama-tiny}\nduration: {steps: 3}\n"
PREPARE = "kind: prepare\nname: a\n"
TUNE = "kind: tune\nname: a\ntrain: base.yaml\n"
EVALUATE = "kind: evaluate\nname: a\ncorpus: c\n"
IS_NAME = "letters, digits, '.', '_' and '-', starting with a letter or digit, 100 at most"
IS_CORPUS = "must be text, or a list of sections with corpus and weight; a number is put in quotes"
OPTIMIZER = "name, lr, weight_decay, betas, eps, momentum, beta2_decay, clip, groups"

FORMS = {
    # whole files
    "": ": the file is empty; a spec is a mapping that begins with `kind:`",
    "- a\n- b\n": ": this is no mapping; a spec is a mapping that begins with `kind:`",
    "name: a\n": ":1: the key kind is missing; one of prepare, train, tune, average, evaluate, compress, serve, pipeline",
    "kind:\nname: a\n": ":1: kind: the key kind is missing; one of prepare, train, tune, average, evaluate, compress, serve, pipeline",
    "\n# a remark\nknid: train\nname: a\n": ":3: knid: unknown key; did you mean kind?",
    "kind: trian\n": ":1: kind: unknown kind 'trian'; did you mean train?",
    "kind: [train]\n": ":1: kind: unknown kind ['train']; did you mean train?",
    "kind: 3\n": ":1: kind: unknown kind 3; one of prepare, train, tune, average, evaluate, compress, serve, pipeline",
    # keys
    TRAIN + "optimiser: {lr: 1}\n": ":6: optimiser: unknown key; did you mean optimizer?",
    TRAIN + "optimizer: {learning_rate: 1}\n": f":6: optimizer.learning_rate: unknown key; there are {OPTIMIZER}",
    TRAIN + "optimizer.lr: 1\n": ":6: optimizer.lr: unknown key; write it as a section, optimizer: {lr: ...}",
    TRAIN + "optimizer: {3: 4}\n": f":6: optimizer.3: unknown key; there are {OPTIMIZER}",
    TRAIN.replace("preset: llama-tiny", "source: x"): ":4: model.source: unknown key; there are preset, config, from, context, mup",
    PREPARE + "sources:\n- a\n- path: b\n  fromat: text\n": ":6: sources.1.fromat: unknown key; did you mean format?",
    TUNE + "space: {optimizer.lr: {unifrom: [1, 2]}}\n": ":4: space.optimizer.lr.unifrom: unknown key; did you mean uniform?",
    TRAIN.replace("corpus: c\n", ""): ":1: corpus: this key is missing; a prepared corpus, by name or path",
    # types
    TRAIN.replace("name: a", "name:"): ":2: name: null: must be text",
    TRAIN.replace("name: a", "name: 12"): ":2: name: 12: must be text; put it in quotes",
    TRAIN.replace("name: a", "name: ../a"): f":2: name: '../a' is no name; {IS_NAME}",
    TRAIN.replace("name: a", "name: " + "a" * 101): f":2: name: '{'a' * 49}… is no name; {IS_NAME}",
    TRAIN.replace("{preset: llama-tiny}", "llama-tiny"):
        ":4: model: 'llama-tiny': must be a section; its keys are preset, config, from, context, mup",
    TRAIN + "seed: abc\n": ":6: seed: 'abc': must be a whole number",
    TRAIN + "seed: 1.5\n": ":6: seed: 1.5: must be a whole number",
    TRAIN + "seed: 4294967296\n": ":6: seed: 4294967296: must be below 4294967296",
    TRAIN + "optimizer:\n": f":6: optimizer: null: must be a section; its keys are {OPTIMIZER}",
    TRAIN + "optimizer: [1, 2]\n": f":6: optimizer: [1, 2]: must be a section; its keys are {OPTIMIZER}",
    TRAIN + "optimizer: {lr: -1}\n": ":6: optimizer.lr: -1: must be above 0",
    TRAIN + "optimizer: {betas: 0.9}\n": ":6: optimizer.betas: 0.9: must be a list",
    TRAIN + "optimizer: {betas: [0.9]}\n": ":6: optimizer.betas: entry 2 is missing",
    TRAIN + "optimizer: {betas: [0.9, 1]}\n": ":6: optimizer.betas.1: 1: must be below 1",
    TRAIN + "schedule: {name: cosin}\n":
        ":6: schedule.name: 'cosin' is not one of cosine, linear, constant, inverse_sqrt, wsd; did you mean cosine?",
    TRAIN + "sharding: {zero: 4}\n": ":6: sharding.zero: 4 is not one of 0, 1, 2, 3",
    EVALUATE + "model: m\nsplit: vall\n": ":5: split: 'vall' is not one of train, val, test; did you mean val?",
    EVALUATE + "model: m\nwindows: 0\n": ":5: windows: 0: must be at least 1",
    EVALUATE.replace(": c", ": [a, 3]") + "model: m\n":
        ":3: corpus: ['a', 3]: must be text, or a list of texts; a number is put in quotes",
    EVALUATE.replace(": c", ": []") + "model: m\n": ":3: corpus: []: must name a corpus",
    EVALUATE + "endpoint: {url: 'http://x', model: m}\n": ":4: endpoint.api_key_file: this key is missing; a file of mode 600 with the key "
        "that it takes",
    EVALUATE + "endpoint: 3\n": ":4: endpoint: 3: must be text, or a section with url, api_key_file and model",
    PREPARE + "sources: stdlib\n": ":3: sources: 'stdlib': must be a list; write [stdlib]",
    PREPARE + "sources: []\n": ":3: sources: []: must have 1 entries at least, not 0",
    TUNE.replace("base.yaml", "3") + "space: {seed: {grid: [1]}}\n": ":3: train: 3: must be a section or text",
    TUNE + "space: {optimizer.lr: 3}\n": ":4: space.optimizer.lr: 3: must be a section; its keys are uniform, loguniform, choice, grid",
    "kind: serve\nname: a\nmodel: m\nport: 99999\n": ":4: port: 99999: must be at most 65535",
    "kind: pipeline\nname: a\nsteps: {a b: {}}\n": f":3: steps.a b: 'a b' is no name; {IS_NAME}",
    PREPARE + "sources: ['']\n": ":3: sources.0.path: '': must not be empty",
    "kind: serve\nname: a\nmodel: m\nhost: ''\n": ":4: host: '': must not be empty",
    TRAIN + "optimizer: {lr: true}\n": ":6: optimizer.lr: true: must be a number",
    TRAIN + "optimizer: {lr: '1e-3'}\n": ":6: optimizer.lr: '1e-3': must be a number; take the quotes off",
    TRAIN + "optimizer: {betas: [true, 0.5]}\n": ":6: optimizer.betas.0: true: must be a number",
    TRAIN + "scale: {workers: '2'}\n": ":6: scale.workers: '2': must be a whole number; take the quotes off",
    TRAIN + "sharding: {zero: true}\n": ":6: sharding.zero: true is not one of 0, 1, 2, 3",
    TRAIN + "sharding: {zero: '1'}\n": ":6: sharding.zero: '1' is not one of 0, 1, 2, 3; did you mean 1?",
    TRAIN.replace("steps: 3", "steps: true"): ":5: duration.steps: true: must be a whole number",
    PREPARE + "sources: [a]\nclean: {fix_encoding: 1}\n": ":4: clean.fix_encoding: 1: must be true or false",
    PREPARE + "sources: [a]\nclean: {fix_encoding: 'true'}\n": ":4: clean.fix_encoding: 'true': must be true or false; take the quotes off",
    PREPARE + "sources: [a]\nclean: {redact: email}\n": ":4: clean.redact: 'email': must be a list; write [email]",
    PREPARE + "sources: [a]\ndedup: fuzy\n": ":4: dedup: 'fuzy' is none of exact, fuzzy, none",
    TRAIN.replace("corpus: c", "corpus: ''"): ":3: corpus: '': must not be empty",
    TRAIN.replace("corpus: c", "corpus:"): f":3: corpus: null: {IS_CORPUS}",
    TRAIN.replace("corpus: c", "corpus: 5"): f":3: corpus: 5: {IS_CORPUS}",
    TRAIN.replace("corpus: c", "corpus: []"): ":3: corpus: []: must have 1 entries at least, not 0",
    TRAIN.replace("corpus: c", "corpus: [a]"): ":3: corpus.0: 'a': must be a section; its keys are corpus, weight, epochs, final_weight",
    TRAIN.replace("corpus: c", "corpus:\n- {corpus: a, weight: 1}\n- {corpus: b, weight: '1'}"):
        ":5: corpus.1.weight: '1': must be a number; take the quotes off",
    TRAIN.replace("corpus: c", "corpus: {mix: [{corpus: '', weight: 1}]}"): ":3: corpus.mix.0.corpus: '': must not be empty",
}
"""What a JSON schema can tell too."""

RULES = {
    # YAML
    TRAIN + "---\n" + TRAIN: ":6: the file holds several documents; one spec a file",
    TRAIN + "name: b\n": ":6: the key name is given twice; keep one of them",
    TRAIN + "batch:\n  global_tokens: 3\n  global_tokens: 4\n": ":8: the key global_tokens is given twice; keep one of them",
    TRAIN + "batch:\n\tglobal_tokens: 3\n": ":7: not valid YAML: a tab; indent with spaces",
    TRAIN + "batch: {global_tokens: 3\n": ":7: not valid YAML: expected ',' or '}', but got '<stream end>', "
                                          "while parsing a flow mapping that begins in line 6",
    "kind:train\nname: a\n": ":2: not valid YAML: mapping values are not allowed here; is a space missing after a colon, "
                             "or quotes around a text with a colon?",
    TRAIN + "seed: *nope\n": ":6: not valid YAML: found undefined alias 'nope'",
    TRAIN + "seed: !foo 3\n": ":6: seed: YAML's tags are not supported, and this is a !foo",
    TRAIN + "batch: !!python/object:os.system {}\n":
        ":6: batch: YAML's tags are not supported, and this is a tag:yaml.org,2002:python/object:os.system",
    # numbers
    TRAIN + "optimizer: {lr: .inf}\n": ":6: optimizer.lr: inf: must be finite",
    # combinations
    TRAIN + "batch: {global_sequences: 8, global_tokens: 3}\n":
        ":6: batch: exactly one of global_tokens, global_sequences must be given, not global_tokens and global_sequences",
    TRAIN.replace("{steps: 3}", "{}"): ":5: duration: exactly one of steps, tokens, epochs must be given, not none",
    TRAIN.replace("preset: llama-tiny", "preset: llama-tiny, from: x"):
        ":4: model: exactly one of preset, config, from must be given, not preset and from",
    TRAIN.replace("llama-tiny", "llama-9"): ":4: model.preset: unknown preset 'llama-9'; there are ",
    TRAIN + "batch: {global_sequences: 32, micro_sequences: 3}\nscale: {workers: 2}\n":
        ":6: batch.micro_sequences: 3 does not divide 32 sequences over 2 workers (16 each); try 1, 2, 4, 8, 16",
    TRAIN + "batch: {global_sequences: 32}\nscale: {workers: 3}\n":
        ":6: batch.global_sequences: 32 sequences cannot be divided over 3 workers; try 30 or 33 sequences",
    TUNE + "space: {optimizer.lr: {loguniform: [3, 1]}}\n":
        ":4: space.optimizer.lr.loguniform: [3.0, 1.0] is no range: the first number must be smaller and above 0",
    PREPARE + "sources: [a]\ntokenizer: {train: bpe, from: x}\n":
        ":4: tokenizer.train: a tokenizer is either trained or taken from a folder: give train or from, not both",
    "kind: serve\nname: v1\nmodel: m\n": ":2: name: an endpoint named v1 would hide the path /v1 of another; take another name",
    TRAIN.replace("corpus: c", "corpus:\n- {corpus: a, weight: 1}\n- {corpus: a, weight: 2}"):
        ":3: corpus: a is there twice; give it once, with the sum of the weights",
    TRAIN + "checkpoint: {average: 3}\n": ":6: checkpoint.average: 3 are not there at the end with keep 2; set keep: 3",
    TRAIN + "ema: {}\ncheckpoint: {average: 2}\n":
        ":7: checkpoint.average: 2 stands beside ema, which is exported; leave one of them out",
    TRAIN + "ema: {decay: 0.9}\nsharding:\n  zero: 3\n  deepspeed: {zero_optimization: {offload_param: {device: nvme}}}\n":
        ":9: sharding.deepspeed.zero_optimization.offload_param: weights on disks cannot be averaged; leave out ema and "
        "checkpoint.average, or set device: cpu",
    # without effect
    TRAIN + "schedule: {decay_fraction: 0.1}\n":
        ":6: schedule.decay_fraction: 0.1 has no effect with cosine: only wsd decays at the end; leave it out",
    TRAIN + "schedule: {name: constant, min_ratio: 0.2}\n":
        ":6: schedule.min_ratio: 0.2 has no effect with constant, which does not fall; leave it out",
    TRAIN + "schedule: {name: inverse_sqrt, min_ratio: 0.2}\n":
        ":6: schedule.min_ratio: 0.2 has no effect with inverse_sqrt, which has no floor; leave it out",
    TRAIN + "schedule: {warmup_steps: 1, warmup_tokens: 9}\n":
        ":6: schedule.warmup_tokens: 9 stands beside warmup_steps 1; leave one of them out",
    TRAIN + "schedule: {warmup_steps: 4}\n": ":6: schedule.warmup_steps: 4 are more than the 3 of duration.steps; shorten the warm-up",
    TRAIN + "schedule: {name: wsd, warmup_steps: 3}\n":
        ":6: schedule.warmup_steps: 3 steps of warm-up overlap the last 1 of 3, which decay; shorten the warm-up or lower decay_fraction",
    TRAIN + "storage: s3://bucket/x\n": ":6: storage: s3://bucket/x: object stores are not supported yet; "
                                        "name a folder that every node sees, e.g. on NFS, Lustre or a mounted bucket",
    TUNE + "space: {seed: {grid: [1, 2, 1.0]}}\n":
        ":4: space.seed.grid: 1.0 is there twice, and would be tried twice; take it out, or set trials to vary the seed",
    TUNE + f"space:\n  seed: {{grid: {[*range(101)]}}}\n  optimizer.lr: {{grid: {[*range(1, 101)]}}}\n":
        ":4: space: its grid has 10,100 points, and a sweep 10,000 trials at most; take fewer values, or choice in place of grid",
    TUNE + "space: {optimizer.lr: {grid: [1, 2]}, optimizer.eps: {uniform: [1, 2]}}\ntrials: 5001\n":
        ":4: space: its grid has 2 points, each 5001 times, and a sweep 10,000 trials at most; "
             "take fewer values, or choice in place of grid",
    TRAIN + "optimizer: {name: muo}\n":
        ":6: optimizer.name: 'muo' is not one of adamw, muon, lion, adafactor, sgd; did you mean muon?",
    TRAIN + "optimizer: {momentum: 0.8}\n":
        ":6: optimizer.momentum: 0.8 has no effect with adamw, whose keys are betas, eps; leave it out",
    TRAIN + "optimizer:\n  groups:\n  - match: a(\n":
        ":8: optimizer.groups.0.match: 'a(' is no regular expression: missing ), unterminated subpattern at position 1",
    TRAIN + "optimizer: {name: lion, eps: 1e-6}\n": ":6: optimizer.eps: 1e-06 has no effect with lion, whose keys are betas; leave it out",
    TRAIN + "optimizer: {name: adafactor}\nsharding: {zero: 1}\n":
        ":7: sharding.zero: 1 flattens matrices, of which adafactor keeps rows and columns; set zero: 0, or take adamw",
    TRAIN + "optimizer: {name: muon, clip: 0}\nsharding: {zero: 2}\nguard:\n  spike:\n    action: skip\n":
        ":10: guard.spike.action: skip: DeepSpeed's muon changes its momentum before the update can be left out under ZeRO; set stop or "
        "warn, or zero: 0",
    TRAIN + "optimizer: {name: muon, clip: 2}\nsharding: {zero: 2}\n":
        ":6: optimizer.clip: 2 would clip muon's orthogonal updates under ZeRO-2, not the gradient; set clip: 0, which muon does not "
        "need, or zero: 0",
    EVALUATE: ":1: exactly one of model, endpoint must be given, not none",
    EVALUATE + "model: m\nendpoint: e\n": ":1: exactly one of model, endpoint must be given, not model and endpoint",
    EVALUATE + "endpoint: {url: x, api_key_file: k}\n": ":4: endpoint.url: 'x': must begin with http:// or https://",
    EVALUATE + "endpoint: e\nworkers: 2\n": ":5: workers: 2 has no effect with an endpoint; leave it out",
    EVALUATE + "model: m\nconcurrent: 2\n": ":5: concurrent: 2 has no effect without an endpoint; leave it out",
    EVALUATE.replace(": c", ": [b, b]") + "model: m\n": ":3: corpus: b is there twice; give it once",
    PREPARE + "sources: [a]\ntokenizer: {from: x, vocab_size: 300}\n":
        ":4: tokenizer.vocab_size: 300 has no effect beside from; leave it out",
    PREPARE + "sources: [a]\ntokenizer: {train: bytes, sample_bytes: 9}\n":
        ":4: tokenizer.sample_bytes: 9 has no effect beside train: bytes; leave it out",
}
"""What only the loader can tell."""

MISTAKES = {**FORMS, **RULES}
RIGHT = [
    TRAIN + "sharding: {zero: 2, deepspeed: {a: {b: [1, 2]}}}\noptimizer: {lr: 1e-3}\n",
    TRAIN.replace("preset: llama-tiny", "from: some/run"),
    PREPARE + "sources: [a, {path: b, format: text}]\ntokenizer: {from: t}\n",
    PREPARE + "sources: [a]\ntokenizer: {train: bytes}\n", TRAIN + "schedule: {name: constant}\n",
    TUNE + "space: {optimizer.lr: {loguniform: [1e-4, 1e-2]}, seed: {grid: [1, 2]}}\nasha: {grace_steps: 3}\n",
    EVALUATE + "model: m\nprompts: [a]\nmax_tokens: 3\n", EVALUATE.replace(": c", ": [a, b]") + "endpoint: e\n",
    EVALUATE + "endpoint: {url: 'http://x/v1', api_key_file: k}\n",
    "kind: serve\nname: a\nmodel: m\n", "kind: pipeline\nname: a\nsteps: {one: {kind: serve, model: '${two}'}, two: {file: b.yaml}}\n",
]


@pytest.fixture
def spec_file(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "a.yaml"
        path.write_text(text, encoding="utf-8")
        return path
    return write


def error(source, overrides=()) -> str:
    with pytest.raises(SpecError) as caught:
        load_spec(source, list(overrides))
    assert caught.value.exit_code == 2 and caught.value.cause == "bad_spec"
    return str(caught.value)


@pytest.mark.parametrize("text", MISTAKES, ids=[" ".join(message.split(";")[0].split()[:9]) for message in MISTAKES.values()])
def test_a_mistake_is_told_in_one_line(spec_file, text):
    path = spec_file(text)
    told = error(path)
    assert told.startswith(f"{path}{MISTAKES[text]}"), told
    assert "\n" not in told and (told == f"{path}{MISTAKES[text]}" or MISTAKES[text].endswith("there are "))


def test_several_mistakes_are_told_in_a_line_each(spec_file):
    path = spec_file(TRAIN + "seed: a\nscale: {workers: 0}\nfoo_bar: 1\n")
    lines = error(path).splitlines()
    assert len(lines) == 3
    assert {line.removeprefix(f"{path}:")[0] for line in lines} == {"6", "7", "8"}


@pytest.mark.parametrize(("override", "told"), [
    ("seed", "--set: 'seed' is no override; write key.path=value, e.g. --set optimizer.lr=0.001"),
    ("=3", "--set: '=3' is no override; write key.path=value, e.g. --set optimizer.lr=0.001"),
    ("batch..x=3", "--set: 'batch..x=3' is no override; write key.path=value, e.g. --set optimizer.lr=0.001"),
    ("seed={", "--set seed: '{' is not valid YAML: expected the node content, but found '<stream end>'"),
    ("seed=1e-3", "--set seed: 0.001: must be a whole number"),
    ("seed.x=3", "--set seed: {'x': 3}: must be a whole number"),
    ("batch.global_sequnces=3", "--set batch.global_sequnces: unknown key; did you mean global_sequences?"),
    ("optimizer=3", f"--set optimizer: 3: must be a section; its keys are {OPTIMIZER}"),
    ("name=", "--set name: null: must be text"),
    ("kind=tran", "--set kind: unknown kind 'tran'; did you mean train?"),
])
def test_a_wrong_override_is_told_by_its_key(spec_file, override, told):
    assert error(spec_file(TRAIN), [override]) == told


@pytest.mark.parametrize(("text", "line"), [
    (TRAIN + "".join("  " * i + "deep:\n" for i in range(900)), 6 + 100), (TRAIN + "deep: " + "{a: " * 900 + "1" + "}" * 900, 6),
    (TRAIN + "deep: " + "[" * 101 + "]" * 101, 6)])
def test_what_lies_too_deep_is_told_with_its_line(spec_file, text, line):
    path = spec_file(text)
    assert error(path) == f"{path}:{line}: sections and lists lie more than 100 deep; no key of a spec lies so deep"
    assert error(spec_file(TRAIN), ["seed=" + "[" * 900 + "]" * 900]).startswith("--set seed: sections and lists lie more than 100 deep")


def test_an_override_finds_its_place_in_a_list(spec_file):
    path = spec_file(PREPARE + "sources: [a, {path: b}]\n")
    loaded = load_spec(path, ["sources.1.format=text"])
    assert [source.format for source in loaded.spec.sources] == ["auto", "text"]
    assert error(path, ["sources.2.format=text"]) == "--set sources.2.format: '2' is no place in a list of 2"


def test_an_override_finds_a_key_that_holds_dots(spec_file):
    path = spec_file(TUNE + "space: {optimizer.lr: {loguniform: [1e-4, 1e-2]}}\n")
    loaded = load_spec(path, ["space.optimizer.lr.loguniform=[1e-3,1e-2]"])
    assert loaded.spec.space["optimizer.lr"].loguniform == (1e-3, 1e-2) and loaded.origins["space.optimizer.lr.loguniform"] == "--set"
    steps = "kind: pipeline\nname: a\nsteps: {tune: {kind: tune, train: t.yaml, space: {optimizer.lr: {grid: [1]}}}}\n"
    loaded = load_spec(spec_file(steps), ["steps.tune.space.optimizer.lr.grid=[2]"])
    assert loaded.spec.steps["tune"]["space"] == {"optimizer.lr": {"grid": [2]}}


def test_an_override_does_not_turn_a_value_into_a_section(spec_file):
    path = spec_file(TUNE + "space: {seed: {grid: [1]}}\n")
    assert error(path, ["train.optimizer.lr=0.1"]) == "--set train.optimizer.lr: train holds a value, 'base.yaml', not a section"


def test_a_file_that_is_not_there_names_the_nearest(spec_file, tmp_path):
    spec_file(TRAIN)
    assert error(tmp_path / "aa.yaml") == f"{tmp_path}/aa.yaml: there is no such file; did you mean {tmp_path}/a.yaml?"
    assert error(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    (tmp_path / "b.yaml").write_bytes(b"kind: \xff\xfe")
    assert error(tmp_path / "b.yaml") == f"{tmp_path}/b.yaml: cannot be read: it is not UTF-8 text"


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("1.5E3", 1500.0), ("2", 2.0), ("6.0e-4", 6e-4)])
def test_numbers_are_read_as_yaml_1_2_says(spec_file, text, value):
    lr = load_spec(spec_file(TRAIN + f"optimizer: {{lr: {text}}}\n")).spec.optimizer.lr
    assert type(lr) is float and lr == value


def test_a_whole_number_may_be_written_as_any_number(spec_file):
    steps = load_spec(spec_file(TRAIN.replace("steps: 3", "tokens: 1e9"))).spec.duration.tokens
    assert type(steps) is int and steps == 10**9
    assert load_spec(spec_file(TRAIN), ["seed=7.0", "optimizer.betas=[0, 0.5]"]).spec.seed == 7


def test_yes_and_no_are_text(spec_file):
    assert load_spec(spec_file(TRAIN.replace("corpus: c", "corpus: no"))).spec.corpus == "no"
    assert load_spec(spec_file(TRAIN.replace("name: a", "name: 2026-01-31"))).spec.name == "2026-01-31"


def test_every_value_knows_its_origin(spec_file):
    text = TRAIN + "optimizer:\n  lr: 1e-3\n  betas: [0.9, 0.99]\nbatch: {global_sequences: 8}\n"
    loaded = load_spec(spec_file(text), ["schedule.warmup_steps=2", "optimizer.lr=2e-3"])
    origins = loaded.origins
    assert origins["kind"] == "a.yaml:1" and origins["model.preset"] == "a.yaml:4"
    assert origins["optimizer.betas"] == "a.yaml:8"
    assert origins["optimizer.lr"] == "--set" and origins["schedule.warmup_steps"] == "--set"
    assert {origins[key] for key in ("optimizer.clip", "schedule.name", "batch.micro_sequences", "seed")} == {"default"}
    assert loaded.spec.optimizer.lr == 2e-3 and loaded.spec.batch.global_sequences == 8


def test_a_value_of_a_short_form_knows_its_origin(spec_file):
    loaded = load_spec(spec_file(TRAIN.replace("corpus: c", "corpus:\n- {corpus: a, weight: 1}\n- {corpus: b, weight: 2}")))
    assert loaded.origins["corpus.mix.1.weight"] == "a.yaml:5" and loaded.origins["corpus.anneal_fraction"] == "default"


def test_what_a_merge_key_brings_has_the_line_of_its_section(spec_file):
    loaded = load_spec(spec_file(TRAIN + "batch:\n  <<: {global_sequences: 8}\n"))
    assert loaded.spec.batch.global_sequences == 8 and loaded.origins["batch.global_sequences"] == "a.yaml:6"


@pytest.mark.parametrize("text", RIGHT)
def test_a_resolved_spec_reads_back_as_itself(spec_file, text):
    spec = load_spec(spec_file(text)).spec
    again = load_spec(spec_file(to_yaml(dump(spec))))
    assert again.spec == spec and type(again.spec) is KINDS[spec.kind]
    assert load_spec(dump(spec)).spec == spec


def test_a_spec_cannot_be_changed():
    spec = load_spec({"kind": "serve", "name": "a", "model": "m"}).spec
    with pytest.raises(ValueError, match="frozen"):
        spec.port = 1


def test_references_wait_but_mistakes_beside_them_do_not():
    data = {"kind": "serve", "name": "a", "model": "${train}", "port": "${p}"}
    assert validate(data, references=True) is None
    with pytest.raises(SpecError, match="replcas: unknown key; did you mean replicas"):
        validate({**data, "replcas": 2}, references=True)


@pytest.mark.parametrize(("sequences", "micro", "workers", "expected"), [(32, None, 1, 16), (32, None, 4, 8), (24, None, 1, 12),
                                                                       (32, 8, 2, 8), (17, None, 1, 1)])
def test_a_micro_batch_divides_a_workers_share(sequences, micro, workers, expected):
    assert check_batch(sequences, Batch(global_sequences=sequences, micro_sequences=micro), workers) == expected
