# Short names for commands. They set up .venv themselves; a second call installs nothing.
PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.installed-$(shell cksum requirements.txt | cut -d ' ' -f 1)

.PHONY: demo reproduce bench test lint clean

demo: $(READY)
	$(PY) benchmarks/demo.py

reproduce: $(READY)
	$(PY) benchmarks/reproduce.py

bench: $(READY)
	$(PY) benchmarks/cost.py

test: $(READY)
	$(PY) -m pytest -q tests

lint: $(READY)
	$(PY) -m ruff check --config .ci/ruff.toml .
	$(PY) -m ruff format --check --config .ci/ruff.toml .

clean:
	rm -rf $(VENV) demo dataset/miniature/world dataset/miniature/world.part distillation/picture_cache distillation/vision_cache benchmarks/reproduce.work

$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
