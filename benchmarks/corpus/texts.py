"""Texts that the benchmarks of this folder share."""

import random
import sysconfig
from collections.abc import Iterable
from pathlib import Path


def prose(size: int) -> list[str]:
    """Documents of 100 to 1,500 words of English lengths by Zipf's law; every fifth is an earlier one with some words changed."""
    generator = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    lengths = generator.choices(range(2, 13), weights=[9, 12, 14, 12, 10, 8, 6, 4, 3, 2, 1], k=40_000)
    vocabulary = ["".join(generator.choices(letters, weights=range(len(letters), 0, -1), k=length)) for length in lengths]
    weights = list(accumulate_zipf(len(vocabulary)))
    texts: list[str] = []
    while size > 0:
        if texts and generator.random() < 0.2:
            words = generator.choice(texts).split(" ")
            for _ in range(generator.randrange(len(words) // 20 + 1)):
                words[generator.randrange(len(words))] = generator.choice(vocabulary)
        else:
            words = generator.choices(vocabulary, cum_weights=weights, k=generator.randrange(100, 1500))
            for i in range(0, len(words), 14):
                words[i] = words[i].capitalize()
                words[i - 1] += generator.choice(",.,.,.!?;\n")
        texts.append(" ".join(words))
        size -= len(texts[-1])
    generator.shuffle(texts)
    return texts


def accumulate_zipf(count: int) -> Iterable[float]:
    total = 0.0
    for rank in range(1, count + 1):
        total += 1 / (rank + 2.7)
        yield total


def standard_library(size: int, packages: bool = False) -> list[str]:
    """Sources of the running interpreter, tests among them, in a shuffled order; with `packages` those of what is installed beside it."""
    texts: list[str] = []
    paths = [path for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")) if "site-packages" not in path.parts]
    for path in paths + (sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")) if packages else []):
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        size -= len(texts[-1])
        if size < 0:
            break
    random.Random(0).shuffle(texts)
    return texts
