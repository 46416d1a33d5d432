"""The layout that the documentation promises: entry scripts, their root lines, imports that point one way, the README."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

from utils import ROOT

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


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """The modules of this repository that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                name for name in (node.module, *(f"{node.module}.{a.name}" for a in node.names)) if name in modules
            }
    return found


def test_imports_run_down_and_never_round():
    """benchmarks -> evaluation -> distillation -> dataset -> utils; sorting the modules topologically fails on a circle."""
    layers = ("utils", "dataset", "distillation", "evaluation", "benchmarks")
    paths = [ROOT / "utils.py", *(path for layer in layers[1:] for path in (ROOT / layer).rglob("*.py"))]
    modules = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in paths}
    arrows = {name: imported_modules(path, set(modules)) - {name} for name, path in modules.items()}

    def layer(name: str) -> int:
        return layers.index(name.split(".")[0])

    assert not [(name, other) for name, others in arrows.items() for other in others if layer(other) > layer(name)]
    assert len(list(TopologicalSorter(arrows).static_order())) == len(modules) > 60
