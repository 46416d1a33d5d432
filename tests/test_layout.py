"""The layout that the documentation promises: entry scripts, root lines, imports that point one way, tests, README."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

from utils import ROOT

TESTS = ROOT / "tests"
ENTRY_SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("dataset", "distillation", "evaluation", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
)
FIXED_PATHS = (
    "distillation/baseline_depth/train.py",
    "distillation/baseline_rgb05b/train.py",
    "distillation/baseline_rgb7b/train2.py",
    "evaluation/onevisionv3/sunrgbd/evaluate_onevision.py",
    "evaluation/onevisionv3/evaluate_onevision.py",
    "dataset/prepare_sunrgbd.py",
)


def test_the_documented_scripts_are_there():
    assert set(FIXED_PATHS) <= set(ENTRY_SCRIPTS)


@pytest.mark.parametrize("script", ENTRY_SCRIPTS)
def test_root_lines_and_utils_first(script):
    text = (ROOT / script).read_text(encoding="utf-8")
    depth = int(re.search(r"ROOT = Path\(__file__\)\.resolve\(\)\.parents\[(\d)\]", text).group(1))
    assert (ROOT / script).resolve().parents[depth] == ROOT
    assert "sys.path.insert(0, str(ROOT))" in text
    imports = re.findall(r"^(?:from|import) (\w+)", text, re.M)
    assert imports[:3] == ["sys", "pathlib", "utils"]


def test_no_file_is_called_like_a_package():
    names = {
        path.stem for folder in ("dataset", "distillation", "evaluation") for path in (ROOT / folder).rglob("*.py")
    }
    taken = sys.stdlib_module_names | packages_distributions().keys()
    assert not (names - {"__init__"}) & taken and find_spec("utils").origin == str(ROOT / "utils.py")


def test_no_link_is_committed():
    """A link to an environment elsewhere, once committed, breaks the first `make` of every clone."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone")
    files = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "utils.py" in files and not [line for line in files.splitlines() if line.startswith("120000")]


def test_nothing_imports_a_training_script():
    for path in [*(ROOT / "dataset").rglob("*.py"), *(ROOT / "distillation").rglob("*.py")]:
        assert not re.search(r"^from distillation\.(baseline|knowledge)", path.read_text(encoding="utf-8"), re.M), path


def test_no_unsafe_loading():
    for path in ROOT.rglob("*.py"):
        if ".venv" not in path.parts and path != Path(__file__):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"weights_only *= *False|trust_remote_code *= *True", text), path


def test_readme_names_existing_files_and_scripts():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for script in re.findall(r"^python (\S+\.py)", text, re.M):
        assert (ROOT / script).is_file(), script
    folders, listed = {}, []  # indentation -> the folder that lines below it are in
    block = re.search(r"## Files\n\n```\n(.*?)```", text, re.S).group(1)
    for line in block.splitlines():
        depth = len(line) - len(line.lstrip())
        above = folders.get(depth - 2, "") if depth else ""
        for name in re.findall(r"[\w./]+(?:\.\w+|/)", line.strip().split("   ")[0]):
            listed.append(above + name)
            if name.endswith("/"):
                folders[depth] = above + name
    assert len(listed) > 20
    assert not [name for name in listed if not (ROOT / name).exists()]


def imported_names(source: str) -> set[str]:
    """All that a file may import, wherever in it: `from a import b` and `import a` give a, the former also a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_imports_run_down_and_never_round():
    """benchmarks, evaluation, distillation, dataset, utils; sorting the modules topologically fails on a circle."""
    layers = ("utils", "dataset", "distillation", "evaluation", "benchmarks")
    paths = [ROOT / "utils.py", *(path for layer in layers[1:] for path in (ROOT / layer).rglob("*.py"))]
    modules = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in paths}
    arrows = {
        name: imported_names(path.read_text(encoding="utf-8")) & modules.keys() - {name}
        for name, path in modules.items()
    }

    def layer(name: str) -> int:
        return layers.index(name.split(".")[0])

    assert not [(name, other) for name, others in arrows.items() for other in others if layer(other) > layer(name)]
    assert len(list(TopologicalSorter(arrows).static_order())) == len(modules) > 60


def forbidden_imports(path: str, source: str) -> list[str]:
    """What a file of tests/ may not import and does: a test file; the benchmarks, unless it is a test of them."""
    own = path.startswith("tests/benchmarks/")
    return [
        name
        for name in sorted(imported_names(source))
        if name.split(".")[-1].startswith("test_") or (name.split(".")[0] == "benchmarks" and not own)
    ]


def test_tests_share_helpers_and_no_test_files():
    files = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in TESTS.rglob("*.py")}
    assert len(files) > 30 and not {
        path: found for path, text in files.items() if (found := forbidden_imports(path, text))
    }
    relative = [path for path, text in files.items() if re.search(r"^\s*from \.", text, re.M)]
    assert not relative  # they would hide what is imported


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("tests/a/test_x.py", "from tests.a.test_y import helper", ["tests.a.test_y"]),
        ("tests/a/test_x.py", "from tests.a import test_y", ["tests.a.test_y"]),
        ("tests/a/test_x.py", "def f():\n    import tests.test_y", ["tests.test_y"]),
        (
            "tests/helpers/x.py",
            "from benchmarks.reproduce import Job",
            ["benchmarks.reproduce", "benchmarks.reproduce.Job"],
        ),
        ("tests/benchmarks/test_x.py", "from benchmarks import cost", []),
        ("tests/a/test_x.py", "from tests.helpers.training import flags", []),
    ],
)
def test_forbidden_imports_are_found(path, source, found):
    assert forbidden_imports(path, source) == found


def test_folders_of_tests_mirror_the_code_and_shadow_nothing():
    """Every folder is a package below `tests`: equal file names, and `tests/dataset` beside `dataset`, do no harm."""
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    assert len(folders) > 8 and {f for f in folders if not (ROOT / f).is_dir()} == {Path("faults")}
    assert not [folder for folder in folders if not (TESTS / folder / "__init__.py").is_file()]
    for name in ("dataset", "distillation", "evaluation", "benchmarks"):
        assert set(find_spec(name).submodule_search_locations) == {str(ROOT / name)}
