# Short names for commands. They set up .venv themselves; a second call installs nothing.
PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.installed-$(shell cksum requirements.txt | cut -d ' ' -f 1)
DEMO ?= demo
RUN := demo_$(shell date +%Y-%m-%d_%H-%M-%S)
TROUBLE := distillation/knowledge_distillation7b_double_trouble
DISTIL = --miniature --run_name $(RUN) --teacher_checkpoint miniature_$(RUN)
FROM_BEFORE = --teacher_questions 8 --load_checkpoint miniature_$(RUN)
EVALUATE := $(PY) evaluation/onevisionv3/sunrgbd/evaluate_onevision.py --miniature

.PHONY: demo reproduce test lint clean

demo: $(READY)
	$(PY) dataset/miniature/world.py
	$(PY) distillation/baseline_rgb7b/train2.py --miniature --run_name $(RUN)
	$(PY) distillation/baseline_rgb05b/train.py --miniature --run_name $(RUN) --max_epochs 1 --subset_percentage 0.5
	$(PY) distillation/baseline_depth/train.py --miniature --run_name $(RUN) --max_epochs 3
	$(PY) $(TROUBLE)/phase1/train_online_kd.py $(DISTIL) --max_epochs 1
	$(PY) $(TROUBLE)/phase2/train_online_kd.py $(DISTIL) --max_epochs 1 $(FROM_BEFORE)
	$(PY) $(TROUBLE)/phase3/train_online_kd.py $(DISTIL) --max_epochs 1 $(FROM_BEFORE)
	$(EVALUATE) --kd_model_type baseline_rgb7b --ckpt_path miniature_$(RUN) --name "RGB teacher" --output $(DEMO)/rgb_teacher
	$(EVALUATE) --kd_model_type baseline_rgb05b --ckpt_path miniature_$(RUN) --name "RGB student" --output $(DEMO)/rgb_student
	$(EVALUATE) --kd_model_type baseline_depth --ckpt_path miniature_$(RUN) --name "depth student, labels only" --output $(DEMO)/depth_student
	$(EVALUATE) --kd_model_type double_trouble --phase_no 3 --ckpt_path miniature_$(RUN) --name "depth student, distilled" --output $(DEMO)/distilled
	$(PY) evaluation/compare.py $(DEMO)/rgb_teacher $(DEMO)/rgb_student $(DEMO)/distilled $(DEMO)/depth_student \
		--baseline "depth student, labels only" --miniature --output $(DEMO)

reproduce: $(READY)
	$(PY) benchmarks/reproduce.py

test: $(READY)
	$(PY) -m pytest -q tests

lint: $(READY)
	$(PY) -m ruff check --config .ci/ruff.toml .
	$(PY) -m ruff format --check --config .ci/ruff.toml .

clean:
	rm -rf $(VENV) $(DEMO) dataset/miniature/world dataset/miniature/world.part distillation/picture_cache distillation/vision_cache benchmarks/reproduce.work

$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
