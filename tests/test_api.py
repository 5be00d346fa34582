"""What `import distlm` gives: the functions behind the command line's verbs, typed, and nothing loaded before it is asked for."""

import ast
import subprocess
import sys
from pathlib import Path

import distlm
from distlm.storage import Storage

README = Path(__file__).parents[1] / "README.md"


def test_every_name_is_what_type_checkers_see_and_is_told_of_in_the_readme() -> None:
    checked, _ = [node for node in ast.parse(Path(distlm.__file__).read_text()).body if isinstance(node, ast.If)]
    seen = {alias.asname or alias.name: f"{node.module}.{alias.name}" for node in checked.body if isinstance(node, ast.ImportFrom)
            for alias in node.names}
    assert seen == {name: "distlm." + home.replace(":", ".") for name, home in distlm._HOMES.items()}
    assert set(distlm.__all__) == set(seen) | {"__version__"} == set(dir(distlm))
    section = README.read_text().split("The same in Python")[1].split("\n## ")[0]
    assert [name for name in seen if f"distlm.{name}" not in section] == []


def test_every_name_is_there_and_importing_the_package_loads_no_library() -> None:
    code = ("import sys, distlm\nprint([name for name in sys.modules if name.startswith('distlm')])\n"
            "heavy = lambda: [name for name in ('ray', 'torch', 'transformers', 'deepspeed', 'pydantic') if name in sys.modules]\n"
            "print(heavy())\n"
            "distlm.resolve, distlm.needs, distlm.status, distlm.cluster_up, distlm.corpus_summary, distlm.tensorboard\nprint(heavy())\n"
            "print(all(callable(getattr(distlm, name)) for name in distlm._HOMES))\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["['distlm']", "[]", "['pydantic']", "True"], done.stdout + done.stderr


def test_a_folder_of_starters_is_planned_and_its_jobs_are_listed_from_python(tmp_path: Path) -> None:
    files = distlm.write_starters(tmp_path / "new")
    rows = dict(distlm.needs(distlm.resolve(tmp_path / "new" / "prepare.yaml", ["sources=[stdlib]"]), Storage(tmp_path)))
    assert tmp_path / "new" / "train.yaml" in files and rows["context"].endswith(" tokens")
    assert distlm.list_jobs(tmp_path) == [] and distlm.local_clusters(distlm.Storage(tmp_path)) == []
