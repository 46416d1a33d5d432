# Short names for commands. They set up .venv themselves; a second call installs nothing. A .venv that is there is kept.
# It gets the newest Python of these that runs; PYTHON=... names another one. Only 3.11 has been tried.
PYTHONS := python3.13 python3.12 python3.11
PYTHON ?= $(firstword $(foreach name,$(PYTHONS),$(shell $(name) -c '' 2> /dev/null && echo $(name))))
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.installed-$(shell cksum requirements.txt | cut -d ' ' -f 1)

MISSING := no Python found that runs: looked for $(PYTHONS). \
	Install one of them or name yours: make PYTHON=/path/to/python
TOO_OLD := $(VENV) has Python %d.%d, which is too old: 3.11 to 3.13 are needed. Call: make clean

.PHONY: demo reproduce bench test test-faults lint clean

demo: $(READY)
	$(PY) benchmarks/demo.py

reproduce: $(READY)
	$(PY) benchmarks/reproduce.py

bench: $(READY)
	$(PY) benchmarks/cost.py

# Files side by side on up to four cores; each file's tests stay together, since they share what they train once.
test: $(READY)
	$(PY) -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile

test-faults: $(READY)
	$(PY) -m pytest -q -m faults tests/faults

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf $(VENV) demo dataset/miniature/world dataset/miniature/world.part distillation/picture_cache \
		distillation/vision_cache benchmarks/reproduce.work

$(READY): requirements.txt
	@$(PY) -m pip --version > /dev/null 2>&1 || \
		$(if $(PYTHON),$(PYTHON) -m venv $(VENV),{ echo "error: $(MISSING)" >&2; exit 1; })
	@$(PY) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("error: $(TOO_OLD)" % v)'
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
