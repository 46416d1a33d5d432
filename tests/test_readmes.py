"""What the READMEs promise: commands that parse, links that lead somewhere, tables that agree."""

import re
import shlex
from pathlib import Path

import pytest

from utils import ROOT, load_script

READMES = sorted(
    [
        ROOT / "README.md",
        *(p for d in ("dataset", "distillation", "evaluation", "benchmarks") for p in (ROOT / d).rglob("README.md")),
    ]
)
NAMES = [path.relative_to(ROOT).as_posix() for path in READMES]
EXAMPLE = "distillation/my_strategy/"  # the folder that "Add a strategy" makes a copy of
COPIED = "distillation/knowledge_distillation7b_logit_based/"


def code_of(text: str) -> list[str]:
    """Lines of code blocks, with continued ones joined, and inline code, which may run over the end of a line."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.S | re.M)
    rest = re.sub(r"^```\n.*?^```", "", text, flags=re.S | re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]


def commands() -> list[str]:
    """Every command of a script of ours, as READMEs give it."""
    found = [code for path in READMES for code in code_of(path.read_text(encoding="utf-8"))]
    return sorted({code for code in found if re.match(r"python \S+\.py( |$)", code)})


def anchors(path: Path) -> set[str]:
    """What a link may point to in this file: its headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table_below(name: str, heading: str) -> dict[str, dict[str, str]]:
    """The first table behind a heading: first cell of a row -> column -> cell."""
    text = (ROOT / name).read_text(encoding="utf-8").split(f"\n{heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", text, re.M).group(0).splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def test_the_main_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500


def test_there_are_commands():
    assert len(commands()) > 20


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    script, *argv = shlex.split(command.removeprefix("python ").replace(EXAMPLE, COPIED), comments=True)
    module = load_script(script)
    if "--help" in argv:
        with pytest.raises(SystemExit, match="0"):
            module.parse_args(argv)
    else:
        module.parse_args(argv)


@pytest.mark.parametrize("name", NAMES)
def test_flags_exist(name):
    """Also those that stand alone in the text, but for what belongs to other programs."""
    source = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("dataset", "distillation", "evaluation", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    )
    known = set(re.findall(r'"(--\w+)"', source)) | {"--help"}
    ours = [
        code
        for code in code_of((ROOT / name).read_text(encoding="utf-8"))
        if not re.search(r"torchrun|pip|#SBATCH", code)
    ]
    assert not {flag for code in ours for flag in re.findall(r"(?<!\S)--\w+", code)} - known


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    path = ROOT / name
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            target, _, anchor = link.partition("#")
            target = (path.parent / target).resolve() if target else path
            target = target / "README.md" if target.is_dir() else target
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target), link


def test_the_short_demo_table_is_part_of_the_long_one():
    short, long = table_below("README.md", "## Try it"), table_below("benchmarks/README.md", "## make demo")
    blind = [cells for system, cells in long.items() if system.startswith("blind: ")]
    best = short.pop("best without an image")
    assert short and blind and len(short) + len(blind) == len(long)

    def value(cell: str) -> str:
        return cell.split(" ")[0]

    for system, cells in short.items():
        full = long[system]
        assert cells == {name: full[name] if name == "Difference" else value(full[name]) for name in cells}, system
    for name in ("Overall", "By depth"):
        assert best[name] == max((value(cells[name]) for cells in blind), key=float), name


def test_the_gain_table_is_the_study_s():
    study = (ROOT / "benchmarks/reproduce/README.md").read_text(encoding="utf-8")
    for share, cells in table_below("README.md", "## What distillation gains").items():
        table = study.split(f"| {share} of the labels |", 1)[1].split("\n\n", 1)[0]
        rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| ")}
        assert f"| {cells['labels only']} |" in rows["label-only"]
        assert f"| {cells['distilled (double trouble)']} |" in rows["double trouble"]
        assert f"| {cells['Gain']} |" in rows["double trouble"]
