# make finetune: from nothing (or from your Co3D) to a trained checkpoint. make help: all targets and variables.

CAPTURES            ?=
CO3D_DIR            ?=
CO3D_ANNOTATION_DIR ?=
SHARDS              ?= data/shards
PACK                ?=
INIT                ?=
NPROC               ?= $(shell n=$$(nvidia-smi -L 2>/dev/null | grep -c '^GPU'); echo $$((n > 0 ? n : 1)))
RUN                 ?= $(if $(filter-out nano,$(INIT)),finetune,$(if $(CAPTURES),captures,$(if $(CO3D_DIR),co3d,$(if $(SHARDS_GIVEN),$(notdir $(SHARDS:%/=%)),demo))))
ARGS                ?=

PYTHON ?= python3
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# vggt-nano, which comes with the project, unless there is a larger model.
RECIPE ?= $(if $(filter-out nano,$(INIT)),default,nano)
# The recipes with adapters are for the published sizes: vggt-nano has one of its own.
CONFIG  = train/configs/$(if $(filter-out nano,$(INIT)),$(RECIPE),$(RECIPE:lora%=nano_lora)).yaml
DEMO   := data/demo
# One process needs no torchrun, whose report after an error hides what the error was.
LAUNCH  = $(BIN)/$(if $(filter 1,$(NPROC)),python,torchrun --standalone --nproc_per_node=$(NPROC))

# Names may hold spaces and signs that the shell knows: it gets them as variables of its own, always between quotes.
# (Not so the tests, which run make themselves.)
SHARDS_GIVEN := $(filter-out file,$(origin SHARDS))
USERS := shards finetune eval proof clean
$(USERS): export CO3D_DIR := $(CO3D_DIR)
$(USERS): export CO3D_ANNOTATION_DIR := $(CO3D_ANNOTATION_DIR)
$(USERS): export SHARDS := $(SHARDS)
$(USERS): export INIT := $(INIT)
$(USERS): export RUN := $(RUN)
# Whether SHARDS is the link to the demo's shards, which lie elsewhere.
IS_DEMO = [ "$$(readlink "$$SHARDS")" = "$$(pwd -P)/$(DEMO)/shards" ]
NO_DEMO = if $(IS_DEMO); then rm "$$SHARDS"; echo "$$SHARDS gets your data; the demo's is SHARDS=$(DEMO)/shards now"; fi

.DEFAULT_GOAL := help
.PHONY: help setup shards finetune trained eval test test-slow check bench proof gpu-check nano clean

help:
	@echo "make finetune    fine-tune vggt-nano, or the published checkpoint, on your data, or on rendered scenes"
	@echo "make eval        is the model of RUN any good? Compared with baselines and with INIT; writes runs/RUN/eval/report.html"
	@echo "make shards      only pack the training data"
	@echo "make setup       only create .venv and install into it"
	@echo "make test        all tests except the slow ones;  make test-slow: those;  make check: lint and types"
	@echo "make bench       what packing, loading, the model and a step cost, as ratios: over an hour, and 16 GB of memory"
	@echo "make proof       that it learns: rendered scenes it has not seen, what is forgotten, overfitting one scene: 30 minutes"
	@echo "make gpu-check   all that a CPU cannot show, on one GPU, in MINUTES=9: what is wrong, and what it measures (docs/GPU.md)"
	@echo "make nano        make vggt-nano, which comes with the project, from nothing: a night on two cores, minutes on a GPU"
	@echo "make clean       remove the demo's data and what tools left; your shards and runs stay"
	@echo
	@echo "CAPTURES=             folders of your captures: COLMAP, nerfstudio, TUM RGB-D, ... (docs/CAPTURES.md)"
	@echo "CO3D_DIR=             Co3D: <category>/<sequence>/images (none: rendered scenes)"
	@echo "CO3D_ANNOTATION_DIR=  VGGT's cameras: <category>_{train,test}.jgz (none: those that come with Co3D)"
	@echo "SHARDS=data/shards    where the packed data goes, or is"
	@echo "PACK=                 options of vggt-prep pack, such as PACK='--test kitchen'; see .venv/bin/vggt-prep pack --help"
	@echo "INIT=                 checkpoint to fine-tune: .pt, .safetensors, facebook/VGGT-1B (none: vggt-nano, which comes with the project)"
	@echo "RECIPE=               one of train/configs, such as lora: adapters, for few captures (default: with INIT default, else nano)"
	@echo "NPROC=                processes on this machine (default: one a GPU, or one)"
	@echo "RUN=                  name of the run: everything goes to runs/RUN (default: finetune with INIT, else captures, co3d, SHARDS' name, demo)"
	@echo "ARGS=                 more settings, such as ARGS='optim.lr=1e-5 epochs=5'; see train/configs/default.yaml"
	@echo "                      values with spaces between quotes of their own: ARGS=\"'data.views=[2, 6]' seed=1\""
	@echo "                      for make eval its options, such as ARGS='--protocol co3d-pose-fast'"

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@echo "installing into .venv (torch is large: this may take some minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "installing the tools for tests and checks"
	@$(PIP) --editable '.[dev]'
	@touch $@

shards: setup
ifneq ($(CAPTURES),)
	@$(NO_DEMO)
	@$(BIN)/vggt-prep pack $(CAPTURES) --out "$$SHARDS" $(PACK)
else ifneq ($(CO3D_DIR),)
	@$(NO_DEMO)
	@$(BIN)/vggt-prep pack --co3d-dir "$$CO3D_DIR" --out "$$SHARDS" \
	  $(if $(CO3D_ANNOTATION_DIR),--annotation-dir "$$CO3D_ANNOTATION_DIR") $(PACK)
else
	@case "$$SHARDS" in "~/"*) SHARDS="$$HOME/$${SHARDS#??}";; esac; \
	if [ -e "$$SHARDS/dataset.json" ]; then echo "$$SHARDS is there: using it"; \
	elif [ "$${SHARDS#*://}" != "$$SHARDS" ]; then echo "using $$SHARDS"; \
	elif [ -n "$(SHARDS_GIVEN)" ] || [ -d "$$SHARDS" ] || { [ -L "$$SHARDS" ] && ! $(IS_DEMO); }; then \
	  echo "$$SHARDS: no finished shard set; pack one with CAPTURES=... or CO3D_DIR=..."; exit 2; \
	else \
	  $(BIN)/vggt-prep synth --out $(DEMO)/captures --family walk --scenes 96 --frames 24 --short-side 120 && \
	  $(BIN)/vggt-prep pack --co3d-dir $(DEMO)/captures/co3d --annotation-dir $(DEMO)/captures/annotations \
	    --out $(DEMO)/shards && \
	  ln -sfn "$$(pwd -P)/$(DEMO)/shards" "$$SHARDS"; fi
endif

finetune: shards
	@OMP_NUM_THREADS=1 $(LAUNCH) train/main.py --config $(CONFIG) \
	  data.shards="$$SHARDS" out_dir="runs/$$RUN" $(if $(INIT),init="$$INIT") $(ARGS)

trained:  # asked first: packing may take long
	@if [ "$(origin RUN) $(RUN)" = "file demo" ] && [ -e "$$SHARDS" ] && ! $(IS_DEMO); then \
	  echo "$$SHARDS is not the demo's any more: name the run to evaluate, such as RUN=captures"; exit 2; fi
	@[ -d "runs/$$RUN/checkpoints" ] || { echo "runs/$$RUN: no such run; train it with make finetune, or name another: RUN=..."; exit 2; }

eval: trained shards
	@if $(IS_DEMO); then set -- --min-frames 24; fi; \
	trained="runs/$$RUN/checkpoints/best"; [ -e "$$trained" ] || trained="runs/$$RUN/checkpoints/latest"; \
	OMP_NUM_THREADS=1 $(LAUNCH) -m train.evaluate --shards "$$SHARDS" \
	  $(if $(INIT),--checkpoint "$$INIT",--with-init) --checkpoint "$$trained" --out "runs/$$RUN/eval" "$$@" $(ARGS)

test: .venv/installed-dev
	@$(BIN)/pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: .venv/installed-dev
	@$(BIN)/pytest -m slow

check: .venv/installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

bench: setup
	@$(BIN)/python bench/packing.py
	@$(BIN)/python bench/overlap.py
	@$(BIN)/python bench/own_captures.py
	@for part in rates workers remote spread; do $(BIN)/python bench/loader.py $$part || exit 1; done
	@for part in decode index; do $(BIN)/python bench/reading.py $$part || exit 1; done
	@for part in speed memory full lora lora-speed; do $(BIN)/python bench/model.py $$part || exit 1; done
	@for part in loop wait ranks checkpoint memory; do $(BIN)/python bench/step.py $$part || exit 1; done

proof: shards
	@$(BIN)/python bench/proof.py heldout --out data/proof
	@$(BIN)/python bench/proof.py finetune --out data/finetune
	@$(BIN)/python bench/proof.py overfit --shards "$$SHARDS"

MINUTES ?= 9
gpu-check:  # asks for the GPU first: torch is large
	@nvidia-smi -L 2>/dev/null | grep -q '^GPU' || \
	  { echo "gpu-check needs an NVIDIA GPU and its driver: nvidia-smi finds none here"; exit 2; }
	@$(MAKE) --no-print-directory .venv/installed-dev
	@$(BIN)/python bench/gpu/check.py --minutes $(MINUTES)

NANO := data/nano
nano: setup
	@$(BIN)/vggt-prep synth --out $(NANO)/captures --family rooms --short-side 70 --scenes 4000 --frames 12 --seed 1
	@$(BIN)/vggt-prep pack --co3d-dir $(NANO)/captures/co3d --annotation-dir $(NANO)/captures/annotations \
	  --min-frames 12 --out $(NANO)/shards
	@for stage in 1 2 3; do \
	  OMP_NUM_THREADS=1 $(LAUNCH) train/main.py --config train/configs/nano_$$stage.yaml \
	    data.shards=$(NANO)/shards $(ARGS) && \
	  $(BIN)/python -m train.export $(NANO)/stage_$$stage/checkpoints/latest --out $(NANO)/stage_$$stage.safetensors || exit 1; \
	done
	@$(BIN)/python -m train.export $(NANO)/stage_3/checkpoints/latest --out vggt/nano --half

clean:
	@if $(IS_DEMO); then rm "$$SHARDS"; fi
	@if [ -f $(DEMO)/captures/synth.json ]; then rm -rf $(DEMO)/captures $(DEMO)/shards; fi  # else it is not the demo's
	@rm -rf $(DEMO)/.captures.unfinished-synth
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
