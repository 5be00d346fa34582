"""Encoders read a text in a batch as transformers reads it alone, take as many tokens as they say, and get a head where they have none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from distlm.errors import InputError, SpecError
from distlm.model.build import Shape, build_model, head_names, model_config, skeleton
from distlm.model.encoder import FAMILIES, Frame, read_frame, room
from distlm.model.loss import ClassifierLoss
from distlm.spec.train import ModelSpec
from distlm.train.batch import LabelledBatch
from tests.model.encoders import CLS, MOST, PAD, SEP, WORDS, config_of, make_encoder, make_tokenizer

FRAME, CONTEXT = Frame((CLS,), (SEP,)), 12
SHAPE = Shape(WORDS, CONTEXT, 0, ("a", "b", "c"), frame=FRAME)
LENGTHS = (1, 12, 5, 7)


def texts() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(rows filled up with token 0, the texts)."""
    torch.manual_seed(1)
    rows = torch.randint(1, WORDS, (len(LENGTHS), CONTEXT))
    for row, length in zip(rows, LENGTHS, strict=True):
        row[length:] = 0
    return rows, [row[:length] for row, length in zip(rows, LENGTHS, strict=True)]


def classifier(family: str, **more: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config_of(family, num_labels=3, **more), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.startswith(("classifier", "score")):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def alone(model: Any, texts: list[torch.Tensor]) -> torch.Tensor:
    """[texts, labels]: by transformers' own forward pass, a text at a time as a tokenizer gives it."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.cat([torch.tensor([CLS]), text, torch.tensor([SEP])])[None]).logits for text in texts])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_in_a_batch_is_read_as_it_is_alone(family: str) -> None:
    model, (rows, each) = classifier(family), texts()
    loss = ClassifierLoss(model, False, None, FRAME).eval()
    with torch.no_grad():
        loss(*LabelledBatch(rows, torch.zeros(len(rows), 1, dtype=torch.int64), 0).inputs(torch.device("cpu")))
    assert loss.observed is not None
    wanted = alone(model, each)
    torch.testing.assert_close(loss.observed[:, 1:], wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - wanted.mean(0)).abs().max() > 1e-3, "of which one could tell nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_takes_as_many_tokens_as_it_says_and_no_more(family: str) -> None:
    model = classifier(family)
    most = room(model.config, FRAME)
    alone(model, [torch.full((most,), 2)])
    if any(name.endswith(("position_embeddings", "embed_positions")) for name, _ in model.named_modules()):
        with pytest.raises((IndexError, RuntimeError)):    # there is a row for each position
            alone(model, [torch.full((most + 1,), 2)])


def test_the_frame_is_what_the_tokenizers_post_processor_puts_around_a_text(tmp_path: Path) -> None:
    assert read_frame(make_tokenizer(tmp_path)) == FRAME and FRAME.size == 2


@pytest.mark.parametrize(("family", "loader"), [
    ("bert", AutoModelForMaskedLM), ("roberta", AutoModel), ("modernbert", AutoModelForMaskedLM), ("distilbert", AutoModelForMaskedLM),
    ("deberta-v2", AutoModel), ("electra", AutoModel)])
def test_what_a_checkpoint_knows_is_taken_and_its_head_is_drawn_from_the_seed(family: str, loader: Any, tmp_path: Path) -> None:
    spec = ModelSpec.model_validate({"from": str(make_encoder(tmp_path, family, loader))})
    config = model_config(spec, SHAPE)
    first, again, other = (build_model(spec, config, seed) for seed in (0, 0, 1))
    known, drawn = dict(loader.from_pretrained(tmp_path).named_parameters()), set[str]()
    for name, value in first.named_parameters():
        assert torch.equal(value, again.get_parameter(name)), name
        own = known.get(name, known.get(name.removeprefix(f"{first.base_model_prefix}.")))
        if own is None:
            drawn.add(name)
            assert not torch.equal(value, other.get_parameter(name)) or value.unique().numel() == 1, name
        else:
            assert torch.equal(value, own), name
    assert "classifier" in " ".join(drawn) and drawn <= head_names(first)
    assert first.config.id2label == {0: "a", 1: "b", 2: "c"} and first.config.pad_token_id == PAD


def test_a_checkpoint_that_lacks_what_is_no_head_is_refused(tmp_path: Path) -> None:
    make_encoder(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["bert.encoder.layer.0.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    spec = ModelSpec.model_validate({"from": str(tmp_path)})
    with pytest.raises(InputError, match=r"the checkpoint has no weights for bert\.encoder\.layer\.0\.output\.dense\.weight"):
        build_model(spec, model_config(spec, SHAPE), 0)


def test_dropout_is_that_of_the_whole_encoder(tmp_path: Path) -> None:
    for family, names in (("bert", ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")),
                          ("distilbert", ("dropout", "attention_dropout", "seq_classif_dropout")),
                          ("modernbert", ("attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout"))):
        spec = ModelSpec.model_validate({"from": str(make_encoder(tmp_path / family, family))})
        config = model_config(spec, SHAPE, 0.25)
        assert {name: getattr(config, name) for name in names} == dict.fromkeys(names, 0.25)


@pytest.mark.parametrize(("shape", "more", "text"), [
    (Shape(WORDS, 16, 0), {}, "an encoder of the bert family: it sees the tokens that it would predict; take a causal family such as "
                              "llama, qwen3 or gpt2, or set objective: classify"),
    (Shape(WORDS, MOST, 0, ("a", "b"), frame=FRAME), {}, f"the checkpoint takes {MOST - 2} tokens beside 2 special ones and the corpus has "
                                                         f"windows of {MOST}; prepare the corpus with context: {MOST - 2}$"),
    (Shape(WORDS, 16, 0, ("a", "b")), {}, "its tokenizer puts no special token before a text"),
    (SHAPE, {"pad_token_id": None}, "its config.json names no pad_token_id")])
def test_what_an_encoder_cannot_do_is_refused(shape: Shape, more: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=text):
        model_config(ModelSpec.model_validate({"from": str(make_encoder(tmp_path, **more))}), shape)


def test_an_encoder_begins_with_a_checkpoint_and_is_of_a_known_family(tmp_path: Path) -> None:
    for shape, family, text in ((SHAPE, "bert", "random weights knows no language that labels could be told by; name a checkpoint of it"),
                                (SHAPE, "modernbert", "name a checkpoint of it with model.from"),
                                (Shape(64, 16, 0), "bert", "it sees the tokens that it is to predict; set is_decoder: true"),
                                (Shape(64, 16, 0), "distilbert", "it sees the tokens that it is to predict; take a causal family")):
        with pytest.raises(SpecError, match=text):
            model_config(ModelSpec(config={"model_type": family}), shape)
    spec = ModelSpec.model_validate({"from": str(make_encoder(tmp_path, "convbert"))})
    with pytest.raises(SpecError, match="convbert is an encoder, and none whose classifiers are known to read a text alone as beside "
                                        "others; take one of albert, bert, "):
        skeleton(model_config(spec, SHAPE))
