"""Functions of Python sources and their docstrings: conversations to learn to document code from, out of any tree of code.

    for one in documented(text): one.name, one.code, one.docstring

Nothing that a function says is made up: its code is the source without the lines of the docstring, and the docstring is cleaned of its
indentation as PEP 257 has it.
"""

import ast
import io
import re
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

Function = ast.FunctionDef | ast.AsyncFunctionDef
FSTRING_START, FSTRING_END = (getattr(tokenize, name, -1) for name in ("FSTRING_START", "FSTRING_END"))
"""Of Python 3.12 and later; before it, an f-string is a STRING."""


@dataclass(frozen=True)
class Documented:
    """A function that says what it does."""

    name: str
    """With the classes that it stands in: `JSONDecoder.decode`."""
    code: str
    """From its first decorator on, without docstring and indentation; that of lines which begin inside a literal stays, as it is what the
    literal says."""
    docstring: str
    bytes: int
    """What both take in the source."""


def documented(text: str) -> Iterator[Documented]:
    """The functions and methods of a module that have a docstring in lines of its own and more to them, in order. Those inside another
    function belong to it. Raises ValueError for what Python does not parse."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        with warnings.catch_warnings():                    # of escapes that are none
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
        literal = _inside_literals(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    lines = text.split("\n")
    for name, node in sorted(_functions(tree), key=lambda pair: pair[1].lineno):
        first = min([node.lineno, *(one.lineno for one in node.decorator_list)]) - 1
        code, docstring = _without_docstring(node, lines, first, literal), trimmed(ast.get_docstring(node, clean=False) or "")
        if code and docstring:
            yield Documented(name, code, docstring, len("\n".join(lines[first:node.end_lineno]).encode(errors="replace")))


def trimmed(docstring: str) -> str:
    """Without indentation and blank ends (PEP 257). Tabs stay: `inspect.cleandoc` would make spaces of them."""
    first, *rest = docstring.splitlines() or [""]
    return "\n".join([first.strip(), *textwrap.dedent("\n".join(rest)).split("\n")]).strip()


def _functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    waiting: list[tuple[str, ast.AST]] = [("", tree)]
    while waiting:
        prefix, node = waiting.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield prefix + child.name, child
            elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
                waiting.append((f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix, child))


def _without_docstring(node: Function, lines: list[str], first: int, literal: set[int]) -> str:
    """Its source; "" where the docstring shares a line with code, or is all there is. `literal`: lines that begin inside a string."""
    quoted = node.body[0]
    begin, end = quoted.lineno - 1, quoted.end_lineno or quoted.lineno
    before = lines[begin].encode()[:quoted.col_offset]
    behind = lines[end - 1].encode()[quoted.end_col_offset:].decode()
    if len(node.body) == 1 or before.strip() or not re.fullmatch(r"\s*(#.*)?", behind):
        return ""
    stop = node.end_lineno or len(lines)
    while end < stop and not lines[end].strip():
        end += 1
    indentation = lines[first][:len(lines[first]) - len(lines[first].lstrip())]
    return "\n".join(lines[i] if i in literal else lines[i].removeprefix(indentation) for i in [*range(first, begin), *range(end, stop)])


def _inside_literals(text: str) -> set[int]:
    """The numbers of the lines that begin inside a string."""
    found, begun = set[int](), list[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.STRING:
            found.update(range(token.start[0], token.end[0]))
        elif token.type == FSTRING_START:
            begun.append(token.start[0])
        elif token.type == FSTRING_END:
            found.update(range(begun.pop(), token.end[0]))
    return found
