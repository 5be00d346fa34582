"""What a pipeline shows at its end."""

from pathlib import Path

from distlm import summary
from distlm.runs import RunFolder
from tests.records import Records


def test_a_run_without_validation_is_shown_with_dashes(tmp_path: Path) -> None:
    made = {"parameters": 1000, "steps": 2, "tokens": 64, "loss_first": 5.0, "loss_last": 4.0, "val_loss_first": None, "val_loss": None,
            "perplexity": None, "bits_per_byte": None, "tokens_per_s": 10.0}
    shown = Records()
    summary.show(None, {"train": ("train", RunFolder(tmp_path), made)}, shown)
    [table] = shown.records
    rows = {row[1]: row[2] for row in table["rows"]}
    assert rows["loss"] == "5.000 -> 4.000" and rows["validation loss"] == rows["perplexity"] == rows["bits per byte"] == "–"


def test_a_prompt_is_gone_on_with_or_answered_in_a_chat() -> None:
    made = {"url": "http://127.0.0.1:8000/v1/", "model": "m", "api_key_file": "/k"}
    said = summary.curl(made, "Why?", chat=True)
    assert "/v1/chat/completions" in said and '"messages": [{"role": "user", "content": "Why?"}]' in said
    assert "/v1/completions" in summary.curl(made, "Once") and '"prompt": "Once"' in summary.curl(made, "Once")
