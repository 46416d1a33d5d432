# Short names for commands. `make demo` and `make test` set up .venv themselves; a second call installs nothing.
PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.installed-$(shell cksum requirements.txt | cut -d ' ' -f 1)
DEMO ?= demo
RUN := demo_$(shell date +%Y-%m-%d_%H-%M-%S)
EVALUATE := $(PY) evaluation/onevisionv3/sunrgbd/evaluate_onevision.py --miniature

.PHONY: demo test lint clean

demo: $(READY)
	$(PY) dataset/miniature/world.py
	$(PY) distillation/baseline_rgb7b/train2.py --miniature --run_name $(RUN)
	$(PY) distillation/baseline_rgb05b/train.py --miniature --run_name $(RUN)
	$(PY) distillation/baseline_depth/train.py --miniature --run_name $(RUN)
	$(EVALUATE) --kd_model_type baseline_rgb7b --ckpt_path miniature_$(RUN) --name "RGB teacher" --output $(DEMO)/rgb_teacher
	$(EVALUATE) --kd_model_type baseline_rgb05b --ckpt_path miniature_$(RUN) --name "RGB student" --output $(DEMO)/rgb_student
	$(EVALUATE) --kd_model_type baseline_depth --ckpt_path miniature_$(RUN) --name "depth student" --output $(DEMO)/depth_student
	$(PY) evaluation/compare.py $(DEMO)/rgb_teacher $(DEMO)/rgb_student $(DEMO)/depth_student \
		--baseline "depth student" --miniature --output $(DEMO)

test: $(READY)
	$(PY) -m pytest -q tests

lint: $(READY)
	$(PY) -m ruff check --config .ci/ruff.toml .
	$(PY) -m ruff format --check --config .ci/ruff.toml .

clean:
	rm -rf $(VENV) $(DEMO) dataset/miniature/world dataset/miniature/world.part

$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
