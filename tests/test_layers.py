"""A folder imports only from those that stand before it, so that a change is felt in one direction alone (docs/design.md)."""

import ast
from pathlib import Path

import pytest

import distlm

ORDER = ["errors", "storage", "spec", "runs", "progress", "head", "cluster", "corpus", "model", "train", "tune", "serve"]
PACKAGE = Path(distlm.__file__).parent


def imported(file: Path) -> set[str]:
    """The modules of distlm that a file imports, inside functions too, but for types alone."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [f"{node.module}.{alias.name}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("distlm.") and not name.startswith("distlm.__")}


@pytest.mark.parametrize("layer", ORDER)
def test_a_layer_imports_only_from_those_before_it(layer: str) -> None:
    files = [PACKAGE / f"{layer}.py"] if (PACKAGE / f"{layer}.py").exists() else sorted((PACKAGE / layer).rglob("*.py"))
    assert files
    allowed = set(ORDER[:ORDER.index(layer) + 1])
    wrong = {str(file.relative_to(PACKAGE)): sorted(imported(file) - allowed) for file in files if imported(file) - allowed}
    assert not wrong
