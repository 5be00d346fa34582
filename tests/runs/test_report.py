"""A run's page says what its files say, and fetches nothing."""

import re
from pathlib import Path

from distlm.runs import RunFolder
from distlm.runs.report import MAX_POINTS, confused, curve, matrices, parts, write_report

HOSTILE = "<script>alert(1)</script>"


def made(path: Path) -> RunFolder:
    folder = RunFolder.create(path, f"kind: train\nname: {HOSTILE!r}\n", {"seed": 7, "corpus": HOSTILE})
    with folder.running():
        folder.metrics({"step": 0, "val_loss": 8.5})
        for step in range(1, 1001):
            folder.metrics({"step": step, "loss": 8.0 - step / 250, "lr": 0.001, "grad_norm": 1.5, "tokens": step * 512,
                            "tokens_per_s": 5000.0 + step, **({"val_loss": 4.25} if step == 1000 else {}),
                            **({"checkpoint_s": step / 100, "checkpoint_stall_s": 0.25} if step % 250 == 1 else {})})
        folder.event("note", "worker_died", HOSTILE)
    return folder


def test_the_page_has_the_last_values_the_curves_the_events_and_what_it_was_made_of(tmp_path: Path) -> None:
    page = write_report(made(tmp_path / "run")).read_text()
    for text in ("<b>1,000</b><span>steps", "<b>512,000</b><span>tokens", "<b>4.0000</b><span>loss", "<b>4.2500</b><span>validation loss",
                 "<b>5,501</b><span>tokens/s", "<b>5.01</b><span>seconds of a checkpoint",
                 "<b>0.25</b><span>of which steps stood still", "val loss 4.25", "step 0 to 1000", "worker_died", "&#34;seed&#34;: 7"):
        assert text in page, text
    assert HOSTILE not in page and page.count("&lt;script&gt;") == 3
    assert not re.search(r"(src|href)=|<script|@import|url\(", page)


def test_a_classifiers_page_has_its_scores_and_its_confusion_matrix(tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    confusion = {"labels": ["ham", HOSTILE], "counts": [[30, 10], [0, 0]]}
    folder.metrics({"step": 1000, "accuracy": 0.75, "f1_macro": 0.7, "confusion": confusion})
    page = write_report(folder).read_text()
    assert "<b>75.00%</b><span>accuracy" in page and HOSTILE not in page and "<th>ham</th>" in page
    assert re.search(r"var\(--a\) 75%, var\(--card\)\)\">30</td><td[^>]*25%[^>]*>10</td>", page)
    [one, two] = matrices([{"confusion": {"labels": ["a", "b"], "counts": [[[5, 1], [2, 3]], [[1, 0], [0, 1]]]}}])
    assert (one.title, two.title) == ("a", "b") and one.rows[1] == ("with", ((2, 40), (3, 60))) and matrices([{"step": 1}]) == []


def test_a_page_of_many_labels_has_those_that_are_confused_most(tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    assert "Most confused" not in write_report(folder).read_text()
    pairs = [{"label": HOSTILE, "taken_for": "ham", "count": 30, "documents": 1200}]
    folder.metrics({"step": 1000, "confused": {"errors": 1234, "distinct": 99, "pairs": pairs}})
    page = write_report(folder).read_text()
    assert "1,234 errors in 99 pairs: the 1 with the most of them." in page and HOSTILE not in page
    assert "<td>ham</td><td>30</td><td>1,200</td><td>2.5%</td>" in page
    found = confused([{"confused": {"errors": 5, "distinct": 1, "labels": [{"label": "a", "missed": 3, "wrongly": 2, "documents": 9}]}}])
    assert found and found.rows == (("a", "3", "9", "2", "5"),) and found.note == "5 errors in 1 label"


def test_a_page_of_preferences_has_the_curves_of_their_rewards(tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    for step in (1, 2):
        folder.metrics({"step": step, "reward_margin": 0.5 * step, "reward_accuracy": 0.25 * step})
    folder.metrics({"step": 2, "val_reward_margin": 0.75, "val_reward_accuracy": 0.625})
    page = write_report(folder).read_text()
    for text in ("Reward margin", "Reward accuracy", "reward margin 1", "val reward margin 0.75", "reward accuracy 0.5",
                 "val reward accuracy 0.625"):
        assert text in page, text


def test_the_page_tells_where_the_time_went_and_what_the_model_says(tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    assert "Where the time went" not in write_report(folder).read_text()
    for step in (1, 2):
        folder.metrics({"step": step, "loss": 1.0, "data_s": 0.5, "forward_s": 1.0, "backward_s": 1.5, "step_s": 3.0,
                        **({"checkpoint_stall_s": 1.0} if step == 2 else {}),
                        "samples": [{"prompt": HOSTILE, "completion": f" says {step}"}]})
    assert [(part.name, part.seconds, part.share) for part in parts(folder.read_metrics())] == [
        ("waiting for samples", "1.0", 12.5), ("forward pass", "2.0", 25.0), ("backward pass", "3.0", 37.5),
        ("gradients exchanged, update", "1.0", 12.5), ("checkpoints, steps standing still", "1.0", 12.5)]
    page = write_report(folder).read_text()
    assert HOSTILE not in page and page.index("says 2") < page.index("as it was before") < page.index("says 1")
    assert "1,000.0</td><td>2.0</td><td>25.0 %" in page


def test_a_curve_is_thinned_and_keeps_its_ends(tmp_path: Path) -> None:
    records = made(tmp_path / "run").read_metrics()
    found = curve("Loss", records)
    assert found and [name for name, *_ in found.lines] == ["loss", "val loss"] and (found.low, found.high) == ("4", "8.5")
    points = found.lines[0][1].removeprefix("M").split(" L")
    assert len(points) <= MAX_POINTS + 1 and points[-1].startswith("634.0,") and points[0].startswith("6.6,")
    assert curve("Loss", [{"step": 1, "lr": 0.1}]) is None
    flat = curve("Learning rate", records)
    assert flat and {point.split(",")[1] for point in flat.lines[0][1].removeprefix("M").split(" L")} == {"100.0"}
