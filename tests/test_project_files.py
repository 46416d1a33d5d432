"""CI, hooks, citation, change log and guide: they name what is there and agree with the Makefile."""

import re

import yaml

from utils import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
RUFF = ".venv/bin/python -m ruff"


def read_yaml(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_ci_runs_what_we_run_on_every_python_that_make_takes():
    (job,) = read_yaml(".github/workflows/ci.yml")["jobs"].values()
    assert job["steps"][-1] == {"run": "bash .ci/run"}
    pythons = re.search(r"^PYTHONS := (.*)", MAKEFILE, re.M).group(1).split()
    assert [f"python{version}" for version in job["strategy"]["matrix"]["python"]] == pythons[::-1]
    assert pythons[-1] == "python3.11" and 'target-version = "py311"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_hooks_download_nothing_and_do_what_make_lint_checks():
    (repository,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    assert {hook["language"] for hook in hooks.values()} == {"system"}
    for name, command in (("ruff-check", "check"), ("ruff-format", "format")):
        assert hooks[name]["entry"].startswith(f"{RUFF} {command} ")
        assert f"$(PY) -m ruff {command} " in MAKEFILE


def test_citation_has_what_its_format_demands():
    citation = read_yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "MIT"
    (holder,) = citation["authors"]
    assert holder["name"] in (ROOT / "LICENSE").read_text(encoding="utf-8")
    (thesis,) = citation["references"]
    assert thesis["type"] == "thesis" and thesis["url"].endswith("/publica/488671") and thesis["year"] == 2025
    assert all(entry["title"] and entry["authors"] for entry in (citation, thesis)) and citation["message"]
    assert "doi" not in citation | thesis  # neither has one


def test_the_change_log_starts_with_the_newest_day():
    days = re.findall(r"^## (.*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert days == sorted(set(days), reverse=True) and all(re.fullmatch(r"\d{4}-\d\d-\d\d", day) for day in days)


def test_the_guides_name_files_and_commands_that_are_there():
    targets = re.search(r"^\.PHONY: (.*)", MAKEFILE, re.M).group(1).split()
    made = {"benchmarks/reproduce/rates.json", "answers.jsonl", "student.json", "manifest.json"}  # by commands
    made |= {"report.html", "predictions.csv"}
    places = (ROOT, ROOT / "dataset", ROOT / "distillation", ROOT / "evaluation", ROOT / "tests")
    for path in ("CHANGELOG.md", ".github/CONTRIBUTING.md"):
        quoted = re.findall(r"`([^`\n]+)`", (ROOT / path).read_text(encoding="utf-8"))
        assert not {name for text in quoted for name in re.findall(r"\bmake (\w+)", text)} - set(targets)
        words = {word for text in quoted for word in text.split()}
        files = {word for word in words if re.fullmatch(r"[\w.-]+(/[\w.-]*)+|\w+\.\w+", word)}
        assert len(files) > 5
        assert not [name for name in files - made if not any((place / name).exists() for place in places)]
