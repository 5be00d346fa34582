"""Python sources become conversations of a function's code and what it says of itself."""

import ast
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distlm.corpus.docstrings import documented, trimmed
from distlm.corpus.files import find_files
from distlm.corpus.inspect import documents
from distlm.corpus.read import Reader
from distlm.corpus.verify import verify
from distlm.errors import InputError, SpecError
from distlm.spec import load_spec
from distlm.spec.prepare import Conversations, Source
from distlm.storage import Storage

SOURCE = '''import os

def first(a):
    """Say it.

        Indented.
    """  # noqa

    # why
    return """
  text"""

class Part:
    """No function."""
    if os.name:
        @property
        def second(self):
            'Short ä.'
            def inner():
                """Belongs to the function around it."""
                return 1
            return inner

    async def third(self): return 1

def alone():
    """Nothing else."""

def beside(): "Shares its line."; return 1

def empty():
    """ """
    return 1
'''


LITERALS = r'''class A:
    def f(self, x):
        "Say."
        y = ("one"
             "two")
        return f"""
        {x + 1}
            <b>
    """ + y, "a\
        b"
'''


def test_a_functions_code_is_its_source_without_the_docstring() -> None:
    first, second = documented(SOURCE)
    assert (first.name, first.docstring) == ("first", "Say it.\n\nIndented.")
    assert first.code == 'def first(a):\n    # why\n    return """\n  text"""'
    assert (second.name, second.docstring) == ("Part.second", "Short ä.")
    assert second.code == ('@property\ndef second(self):\n    def inner():\n        """Belongs to the function around it."""\n'
                           "        return 1\n    return inner")
    begin = SOURCE.index("        @property")
    assert second.bytes == len(SOURCE[begin:SOURCE.index("    async")].rstrip("\n").encode())
    assert [one.code for one in documented(SOURCE.replace("\n", "\r\n"))] == [first.code, second.code]
    assert trimmed(" a\n\tb\n\t\tc\n") == "a\nb\n\tc" and trimmed("") == trimmed(" \n ") == ""
    for broken in ("def f(:\n", "\0", "(" * 100_000, "x = " + "-" * 100_000 + "1"):
        with pytest.raises(ValueError, match="Error: "):
            list(documented(broken))


def test_what_a_string_says_stays_however_deep_its_function_stands() -> None:
    """Lines that begin inside a string keep their indentation; those that only begin with one lose it as code does."""
    [one] = documented(LITERALS)
    lines = LITERALS.rstrip("\n").split("\n")
    assert one.code.split("\n") == [line[4:] for line in (lines[1], *lines[3:6])] + lines[6:]
    told: dict[str, Any] = {}
    exec(f"{LITERALS}\nold = A.f\n{one.code}", told)
    assert told["f"](0, 1) == told["old"](0, 1)


def functions(tree: ast.Module) -> set[str]:
    """What each function of a module does but for its first statement."""
    found = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first, *node.body = node.body
            found.add(ast.dump(node))
            node.body.insert(0, first)
    return found


def test_the_standard_librarys_functions_are_the_same_without_their_docstrings() -> None:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("p*.py")):            # pydoc, which writes pages, among them
        text = path.read_text()
        found, given = list(documented(text)), functions(ast.parse(text))
        assert sum(one.bytes for one in found) <= len(text.encode())
        for one in found:
            (function,) = ast.parse(one.code).body
            assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and one.name.split(".")[-1] == function.name
            assert ast.dump(function) in given, f"{path}: {one.name}"
            assert len(f"{one.code}\n\n{one.docstring}".encode()) <= one.bytes


def test_a_file_gives_a_record_per_function_and_its_bytes_add_up(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "b.py").write_text("def f(:\n")
    (tmp_path / "c.py").write_bytes(b"# \xff")
    files = find_files([Source(path=str(tmp_path), format="docstrings")])
    found = {}
    for file in files:
        reader = Reader(file, 10_000, Conversations())
        found[file.name[-4:]] = list(reader.records())
        assert sum(record.bytes for record in found[file.name[-4:]]) == reader.stream_bytes == file.bytes
    assert [(one.id, one.documents, [role for role, _ in one.turns]) for one in found["a.py"]] == [
        ("first", 1, ["user", "assistant"]), ("Part.second", 1, ["user", "assistant"]), ("", 0, [])]
    assert [one.reason for one in found["b.py"] + found["c.py"]] == ["malformed", "not_utf8"]


@pytest.mark.parametrize(("source", "job", "message"), [
    ({"format": "docstrings"}, {}, "sources.0.format: docstrings makes conversations; give conversations: {} beside sources"),
    ({"format": "docstrings", "keep": ["a"]}, {"conversations": {}}, "sources.0.keep: .* has no effect beside conversations"),
    ({"format": "docstrings"}, {"conversations": {"role_key": "from"}}, "conversations.role_key: from has no effect, as all sources are"),
    ({"format": "text"}, {"conversations": {}}, "text holds no conversations; give jsonl, parquet or docstrings")])
def test_what_docstrings_cannot_be_beside_is_refused(source: dict[str, Any], job: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_spec({"kind": "prepare", "name": "d", "sources": [{"path": "stdlib", **source}], **job})


def test_python_sources_become_a_corpus_of_conversations(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.py").write_text(f'def f{i}(x):\n    """Add {i}."""\n    return x + {i}\n')
    made = run([{"path": str(folder), "format": "docstrings"}], conversations={}, context=64, tokenizer={"train": "bytes"},
               split={"val_fraction": 0.3})
    corpus = Storage(tmp_path / "store").corpus("words")
    verify(corpus)
    assert made["documents"] == 12 and made["val_tokens"] > 0
    (shown,) = documents(corpus, ["f7"])
    assert shown.text.startswith("<|user|>def f7(x):\n    return x + 7<|assistant|>Add 7.")
    assert "⟦Add 7.<|endoftext|>⟧" in shown.shown
    with pytest.raises(InputError, match="of Python sources format: docstrings makes conversations"):
        run([str(folder)], root="other", conversations={})
