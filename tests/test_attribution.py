"""What `distlm explain` says: surprisal is the model's own, attributions add up, and what cannot be explained is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from distlm import cli
from distlm.attribution import Explanation, explain, integrated_gradients, write_page
from distlm.errors import InputError
from distlm.spec.curate import Clean
from tests.serve.tiny_models import FAMILIES, make_classifier, make_model

TEXT = "def main(argument):\n\treturn naïve 東京 <script>"


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def language(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / request.param, FAMILIES[request.param])


@pytest.fixture(scope="module", params=[False, True], ids=["single", "multiple"])
def classifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("classifiers") / "c", multiple=request.param)


def test_surprisal_is_that_of_the_models_own_loss_and_the_target_its_likeliest_token(language: Path) -> None:
    found = explain(str(language), TEXT)
    tokenizer, model = AutoTokenizer.from_pretrained(language), AutoModelForCausalLM.from_pretrained(language)
    ids = tokenizer(TEXT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        made = model(input_ids=ids, labels=ids)
    assert found.bits == pytest.approx(made.loss.item() / torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    first, *others = found.tokens
    assert first.surprisal is None and all(one.surprisal is not None and one.surprisal > 0 for one in others)
    best = made.logits[0, -1].softmax(-1).max(0)
    assert found.target == tokenizer.decode([best.indices]) and found.probability == pytest.approx(best.values.item(), rel=1e-4)
    assert "".join(one.text for one in found.tokens) == TEXT and len(found.tokens) == ids.shape[1]


def test_attributions_add_up_to_what_the_text_adds(language: Path) -> None:
    found = explain(str(language), TEXT, steps=256)
    assert abs(found.gap) < 0.01 * max(1, abs(found.added)) and found.complete
    assert not explain(str(language), TEXT, steps=1).complete
    other = explain(str(language), TEXT, target="a", steps=256)
    assert other.target == "a" != found.target and other.probability < found.probability


def captums(network: Any, ids: torch.Tensor, chosen: int, steps: int) -> torch.Tensor:
    """What captum's LayerIntegratedGradients says that each token adds to the log-probability of `chosen`, from the mean of all embeddings:
    it takes a beginning by its id, so that the mean is one more row of the table. Returns float[tokens]."""
    attr = pytest.importorskip("captum.attr", exc_type=ImportError)
    network.requires_grad_(False)
    own = network.get_input_embeddings()
    rows = own(torch.arange(own.num_embeddings))
    table = torch.nn.Embedding.from_pretrained(torch.cat([rows, rows.mean(0, keepdim=True)]), freeze=False)

    def score(tokens: torch.Tensor) -> torch.Tensor:
        embedded = table(tokens)
        logits = network(inputs_embeds=embedded, attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long), use_cache=False).logits
        last = logits if logits.dim() == 2 else logits[:, -1]
        several = network.config.problem_type == "multi_label_classification"
        return (last.sigmoid().log() if several else last.log_softmax(-1))[:, chosen]

    found = attr.LayerIntegratedGradients(score, table).attribute(
        ids[None], baselines=torch.full_like(ids, own.num_embeddings)[None], n_steps=steps, method="riemann_middle", internal_batch_size=8)
    return found[0].sum(-1).detach().float()


@pytest.mark.parametrize("steps", [2, 40])
def test_attributions_are_captums(steps: int, language: Path) -> None:
    found, tokenizer = explain(str(language), TEXT, steps=steps), AutoTokenizer.from_pretrained(language)
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    network = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32).eval()
    with torch.no_grad():
        chosen = int(network(input_ids=ids[None]).logits[0, -1].argmax())
    agree(found, captums(network, ids, chosen, steps))


@pytest.mark.parametrize("steps", [2, 40])
def test_attributions_of_a_label_are_captums(steps: int, classifier: Path) -> None:
    found, tokenizer = explain(str(classifier), TEXT, target="spam", steps=steps), AutoTokenizer.from_pretrained(classifier)
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    network = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float32).eval()
    agree(found, captums(network, ids, next(i for i, name in network.config.id2label.items() if name == "spam"), steps))


def agree(found: Explanation, theirs: torch.Tensor) -> None:
    """Every attribution, within what float32 rounds of the largest."""
    ours = torch.tensor([one.attribution for one in found.tokens])
    assert ours.abs().max() > 0.01 and (ours - theirs).abs().max() < 1e-5 * ours.abs().max()


def test_what_matters_alone_has_all_of_it_and_a_straight_way_takes_one_step() -> None:
    base, given = torch.zeros(5, 3), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, -2.0, 3.0])
    found = integrated_gradients(lambda points: points[:, 2] @ weights, base, given, 1)
    assert torch.allclose(found, torch.where(torch.arange(5) == 2, given[2] @ weights, 0.0))
    found = integrated_gradients(lambda points: (points[:, 1] ** 2).sum(-1), base, given, 50)
    assert found[1].item() == pytest.approx((given[1] ** 2).sum().item(), rel=1e-5) and found[[0, 2, 3, 4]].abs().max() == 0


def test_a_text_is_cleaned_first_as_the_classifier_s_documents_were(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "c")
    (folder / "distlm.json").write_text(json.dumps({"clean": Clean(redact=["email"]).model_dump(mode="json")}))
    shown = "".join(one.text for one in explain(str(folder), "mail one@example.org now", steps=1).tokens)
    assert "example" not in shown and shown.startswith("mail ") and shown.endswith(" now")


def test_a_label_is_explained(classifier: Path) -> None:
    found = explain(str(classifier), TEXT, steps=128)
    ids = AutoTokenizer.from_pretrained(classifier)(TEXT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
    chances = logits.sigmoid() if model.config.problem_type.startswith("multi") else logits.softmax(0)
    assert found.target == model.config.id2label[int(chances.argmax())]
    assert found.probability == pytest.approx(chances.max().item(), rel=1e-4)
    assert found.bits is None and found.complete
    assert explain(str(classifier), TEXT, target="spam").target == "spam"
    with pytest.raises(InputError, match="no label 'span'; did you mean spam"):
        explain(str(classifier), TEXT, target="span")


def test_what_cannot_be_explained_is_refused(language: Path) -> None:
    for text, target, said in (("", None, "no text"), ("a" * 1000, None, r"tokens are more than the 128 of"),
                               (TEXT, "argument x", r"'argument x' is \d tokens, and one is predicted; take its first"),
                               (TEXT, "", "is 0 tokens")):
        with pytest.raises(InputError, match=said):
            explain(str(language), text, target=target)


def test_a_classifier_is_explained_as_its_endpoint_reads_and_refused_as_it_refuses(tmp_path: Path) -> None:
    folder, text = make_classifier(tmp_path / "c"), "the cat sat on the mat and the dog barked " * 20
    with pytest.raises(InputError, match=r"tokens are more than the 128 of"):
        explain(str(folder), text, steps=1)
    (folder / "distlm.json").write_text(json.dumps({"cut_tokens": 20}))
    found = explain(str(folder), text, steps=1)
    assert found.truncated and len(found.tokens) == 20 and text.startswith("".join(one.text for one in found.tokens))
    write_page(found, tmp_path / "page.html")
    assert "was cut as they were" in (tmp_path / "page.html").read_text()
    assert not explain(str(folder), "the cat", steps=1).truncated
    config = json.loads((folder / "config.json").read_text())
    for changes, said in (({"pad_token_id": None}, "names no pad_token_id"), ({"problem_type": "regression"}, "tells no labels apart")):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(InputError, match=said):
            explain(str(folder), "the cat", steps=1)


def test_what_no_tokenizer_takes_and_no_path_is_refused() -> None:
    for keys, said in (({"text": "a\ud800"}, "text: the text holds half a surrogate pair"),
                       ({"text": "a", "target": "\udfff"}, "^target: the text holds half"),
                       ({"text": "a", "steps": 0}, "steps: 0 points are no path; take 1 or more")):
        with pytest.raises(InputError, match=said):
            explain("no-model-is-needed", **keys)  # type: ignore[arg-type]


def test_a_page_shows_the_text_as_text(language: Path, tmp_path: Path) -> None:
    write_page(explain(str(language), TEXT), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http-equiv", "") and "東" in page and "⏎" in page
    assert page.count("nats\"") == len(explain(str(language), TEXT).tokens)


def test_the_command_writes_a_page_once(language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
                                        ) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> int:
        with pytest.raises(SystemExit) as ended:
            cli.main(["explain", str(language), "def main(", *words])
        return int(ended.value.code or 0)

    assert run("--steps", "256") == 0
    said = capsys.readouterr()
    assert "explain.html" in said.out and "target" in said.out and not said.err
    assert run() == 2 and "give another --output, or --force" in capsys.readouterr().err
    assert run("--force", "--steps", "1") == 0 and "raise --steps" in capsys.readouterr().err
    assert run("--json") == 0 and len(json.loads(capsys.readouterr().out)["tokens"]) > 3
