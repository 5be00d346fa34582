"""What is known of a file of a tree of code: its language, its licence, and whether that is one to keep."""

from pathlib import Path

import pytest

from distlm.corpus.files import find_files
from distlm.corpus.filters import Filters
from distlm.corpus.read import Reader
from distlm.corpus.trees import Licenses, allows, language, recognised, tagged
from distlm.errors import SpecError
from distlm.spec import load_spec
from distlm.spec.curate import Filter
from distlm.spec.prepare import Source

MIT = ("Permission is hereby granted, free of charge, to any person obtaining a copy\nof this software and associated documentation files "
       "(the \"Software\"), to deal ...\nThe above copyright notice and this permission notice shall be included in all copies.")
BSD = "Redistribution and use in source and binary forms ...\n2. Redistributions in binary form must reproduce the above notice\n"
APACHE = "                                 Apache License\n                           Version 2.0, January 2004\n"
GPL3 = "  GNU GENERAL PUBLIC LICENSE\n   Version 3, 29 June 2007 ... 13. Use with the GNU Affero General Public License."


@pytest.mark.parametrize(("name", "expected"), [
    ("a.py", "Python"), ("src/A.PY", "Python"), ("a.py.gz", "Python"), ("a.rs", "Rust"), ("a.h", "C"), ("a.pl", "Perl"), ("a.R", "R"),
    ("x/Makefile", "Makefile"), ("CMakeLists.txt", "CMake"), ("Dockerfile", "Docker"), ("README.md", "Markdown"), ("a.txt", ""),
    ("LICENSE", ""), ("a.nothing", ""), ("", "")])
def test_the_name_of_a_file_says_its_language(name: str, expected: str) -> None:
    assert language(name) == expected


@pytest.mark.parametrize(("text", "expected"), [
    (MIT, "MIT"), (BSD, "BSD-2-Clause"), (BSD + "3. Neither the name of the ...", "BSD-3-Clause"), (APACHE, "Apache-2.0"),
    (GPL3, "GPL-3.0-only"), (APACHE + "---- LLVM Exceptions to the Apache 2.0 License ----", "Apache-2.0 WITH LLVM-exception"),
    ("/* SPDX-License-Identifier: MPL-2.0 */ " + MIT, "MPL-2.0"), (MIT + "\n\nBundled:\n" + APACHE, "MIT"), ("All rights reserved.", ""),
    ("", "")])
def test_a_licence_is_known_by_its_tag_or_by_phrases_of_its_text(text: str, expected: str) -> None:
    assert recognised(text) == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("# SPDX-License-Identifier: MIT\nimport a", "MIT"), ("/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */", "(GPL-2.0-only OR MIT)"),
    ("<!-- SPDX-License-Identifier: Apache-2.0 -->", "Apache-2.0"), ("x" * 3000 + "SPDX-License-Identifier: MIT", ""),
    ("// SPDX-License-Identifier: GPL-2.0-only WITH  Linux-syscall-note", "GPL-2.0-only WITH Linux-syscall-note")])
def test_a_tag_in_the_head_of_a_text_is_read(text: str, expected: str) -> None:
    assert tagged(text) == expected


@pytest.mark.parametrize(("expression", "expected"), [
    ("MIT", True), ("GPL-3.0-only", False), ("GPL-3.0-only OR MIT", True), ("MIT AND GPL-3.0-only", False), ("MIT AND ISC", True),
    ("GPL-3.0-only OR MIT AND ISC", True), ("(GPL-3.0-only OR MIT) AND X", False), ("ISC AND (X OR MIT)", True), ("MIT WITH X", True),
    ("GPL-2.0-only WITH Y", True), ("GPL-2.0-only WITH Z", False), ("", False), ("MIT OR", False), ("(MIT", False), ("MIT ISC", False),
    ("MIT)", False), ("X OR (MIT", False)])
def test_an_expression_is_met_by_one_side_of_an_or_and_by_both_of_an_and(expression: str, expected: bool) -> None:
    assert allows(expression, {"MIT", "ISC", "GPL-2.0-only WITH Y"}) == expected


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Licences at the root, below it, two in a folder, one that nobody knows; outside the tree another."""
    root = tmp_path / "tree"
    for name, text in {"LICENSE": MIT, "a.py": "a = 1", "sub/b.rs": "b", "vendor/COPYING.txt": GPL3, "vendor/deep/c.c": "c",
                       "dual/d.py": "d", "dual/LICENSE-MIT": MIT, "dual/LICENSE-APACHE": APACHE, "odd/LICENCE": "ask me", "odd/e.py": "e",
                       "noted/NOTICE": "(c)", "noted/f.py": "f", "sub/license.py": "g",
                       "tag.py": "# SPDX-License-Identifier: ISC\n"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "LICENSE").write_text(APACHE)
    return root


def test_a_file_has_the_licence_of_the_nearest_file_that_has_one_inside_the_source(tree: Path) -> None:
    files = find_files([Source(path=str(tree), code=True)])
    found = {file.name: file.license for file in files if Path(file.name).suffix not in ("", ".txt")}
    assert found == {"tree/a.py": "MIT", "tree/sub/b.rs": "MIT", "tree/vendor/deep/c.c": "GPL-3.0-only",
                     "tree/dual/d.py": "Apache-2.0 AND MIT", "tree/odd/e.py": "",
                      "tree/noted/f.py": "MIT", "tree/sub/license.py": "MIT", "tree/tag.py": "MIT"}
    assert [file.license for file in find_files([Source(path=str(tree / "sub"), code=True)])] == ["", ""]
    assert [file.license for file in find_files([Source(path=str(tree / "*/*.rs"), code=True)])] == ["MIT"]
    assert {file.license for file in find_files([Source(path=str(tree))])} == {""}
    assert Licenses(tree / "a.py").of(tree / "a.py") == ""


def test_documents_of_a_tree_keep_path_language_and_licence_where_the_source_says_so(tree: Path) -> None:
    def metas(**keys: bool) -> dict[str, object]:
        files = find_files([Source(path=str(tree), **keys)])
        return {file.name: record.meta for file in files for record in Reader(file, 10_000).records()}

    assert metas(code=True)["tree/sub/b.rs"] == {"path": "tree/sub/b.rs", "language": "Rust", "license": "MIT"}
    assert metas(code=True)["tree/tag.py"] == {"path": "tree/tag.py", "language": "Python", "license": "ISC"}
    assert set(map(str, metas().values())) == {"{}"}


@pytest.mark.parametrize(("expression", "keep", "expected"), [
    ("mit", {"MIT"}, True), ("MIT", {"mit"}, True), ("apache-2.0 or Gpl-2.0-Only", {"APACHE-2.0"}, True), ("mit AND isc", {"MIT"}, False),
    ("apache-2.0 With LLVM-EXCEPTION", {"Apache-2.0 WITH  LLVM-exception"}, True), ("mit-0", {"MIT"}, False)])
def test_the_ids_of_licences_are_the_same_in_small_and_capital_letters(expression: str, keep: set[str], expected: bool) -> None:
    assert allows(expression, keep) == expected
    rules = Filter.model_validate({"license": {"keep": sorted(keep)}})
    assert Filters(rules).reasons("text", meta={"license": expression}) == ([] if expected else ["license"])


def test_documents_of_other_licences_are_rejected_with_their_reason() -> None:
    rules = Filter.model_validate({"license": {"keep": ["MIT", "ISC"]}})
    reasons = [Filters(rules).reasons("text", meta=meta) for meta in
               ({"license": "MIT"}, {"license": "X"}, {"license": ""}, {}, {"license": ["MIT", "X"]}, {"license": ["MIT", "ISC"]})]
    assert reasons == [[], ["license"], ["no_license"], ["no_license"], ["license"], []]
    lenient = Filter.model_validate({"license": {"keep": ["MIT"], "keep_unknown": True}})
    assert Filters(lenient).reasons("text", meta={}) == [] and Filters(Filter()).reasons("text", meta={"license": "X"}) == []


def test_a_licence_is_asked_only_of_sources_that_have_one() -> None:
    job = {"kind": "prepare", "name": "a", "filter": {"license": {"keep": ["MIT"]}}}
    for source in ({"path": "a", "code": True}, {"path": "a", "keep": ["license"]}, {"path": "a", "filter": {"license": None}}):
        load_spec({**job, "sources": [source]})
    with pytest.raises(SpecError, match=r"sources\.0: filter\.license asks for a license.*; set code: true"):
        load_spec({**job, "sources": ["a"]})
    with pytest.raises(SpecError, match=r"sources\.0\.code: True has no effect beside format: jsonl"):
        load_spec({**job, "sources": [{"path": "a", "format": "jsonl", "code": True}]})
