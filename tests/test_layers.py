"""A folder imports only from those that stand before it, so that a change is felt in one direction alone (docs/design.md)."""

import ast
from pathlib import Path

import pytest

import distlm

ORDER = ["errors", "process", "machine", "storage", "spec", "runs", "progress", "head", "cluster", "autoscale", "clusterfile", "init",
         "dashboard", "upload", "text", "corpus", "model", "train", "tune", "serve", "evaluate", "average", "compress", "attribution",
         "summary", "outputs", "execute", "plan", "jobs", "endpoints", "stopping", "submitting", "logs", "cli", "__main__"]
ONE = {"pipeline": "execute", "reads": "execute"}
"""A pipeline is a job whose steps are jobs, and asks of each what it reads: they call each other."""
STRANGERS = {"serve": {"corpus", "train", "tune"}, "model": {"corpus"}}
"""Layer -> those before it that it may not know all the same."""
PACKAGE = Path(distlm.__file__).parent


def imported(file: Path) -> set[str]:
    """The modules of distlm that a file imports, inside functions too, but for types alone."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [f"{node.module}.{alias.name}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    found = {name.split(".")[1] for name in names if name.startswith("distlm.") and not name.startswith("distlm.__")}
    return {ONE.get(name, name) for name in found}


def files_of(layer: str) -> list[Path]:
    names = [layer, *(name for name, one in ONE.items() if one == layer)]
    return [file for name in names for file in (sorted((PACKAGE / name).rglob("*.py")) or [PACKAGE / f"{name}.py"])]


@pytest.mark.parametrize("layer", ORDER)
def test_a_layer_imports_only_from_those_before_it(layer: str) -> None:
    allowed = set(ORDER[:ORDER.index(layer) + 1]) - STRANGERS.get(layer, set())
    found = {file: imported(file) - allowed for file in files_of(layer)}
    assert {str(file.relative_to(PACKAGE)): sorted(wrong) for file, wrong in found.items() if wrong} == {}


def test_every_module_has_its_layer() -> None:
    assert {file for layer in ORDER for file in files_of(layer)} == set(PACKAGE.rglob("*.py")) - {PACKAGE / "__init__.py"}
