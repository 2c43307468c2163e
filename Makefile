# make demo       set up and train on generated videos; results in runs/demo
# make demo-prepared   prepare the demo's videos (python -m dataset.prepare) and train on the copy; as make demo
# make demo-ann   the same command with the ANN branch alone: it cannot tell the motions apart
# make demo-binding   train --fusion film on generated videos that need both branches; results in runs/demo-binding
# make check      the quick tests: units, golden numbers, refusals; no processes, no killing, few kernels
# make test       set up and run every test that needs no GPU
# make test-gpu   set up and run the tests that need a CUDA device
# make lint       set up and run ruff
# make bench      set up and run the benchmarks that need no GPU

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Empty for the newest versions that requirements.txt admits: make CONSTRAINTS= test
CONSTRAINTS ?= constraints.txt
READY := $(VENV)/.ready
CLIPS ?= ../shared/clips

TRAINED := --weights none --downsample -T 8 --stride 4 --size 64 -b 16 -lr 0.05 --clip-norm 1 --warmup-epochs 1 --epochs 6
DEMO := --dset demo $(TRAINED)

.PHONY: help setup demo demo-prepared demo-ann demo-binding check test test-gpu lint bench clean

help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(READY)

$(READY): requirements.txt requirements-dev.txt $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed, $(PYTHON) is older; name another with make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt $(addprefix -c ,$(CONSTRAINTS))
	@touch $(READY)

demo: $(READY)
	$(BIN)/python train_fusion.py $(DEMO) --run-dir runs/demo --overwrite

demo-prepared: $(READY)
	$(BIN)/python -m dataset.prepare --dset demo --data-root data/demo --out data/demo-prepared
	$(BIN)/python train_fusion.py $(DEMO) --data-root data/demo-prepared --run-dir runs/demo-prepared --overwrite

demo-ann: $(READY)
	$(BIN)/python train_fusion.py $(DEMO) --branches ann --run-dir runs/demo-ann --overwrite

demo-binding: $(READY)
	$(BIN)/python train_fusion.py --dset demo-binding --fusion film $(TRAINED) --run-dir runs/demo-binding --overwrite

# Two processes, a file of tests to each at a time; most tests use one thread, and start processes of their own.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What takes long: whole runs, several processes, killing, kernels in Triton's interpreter.
SLOW := scripts/test_survival scripts/test_train_fusion scripts/test_train_kinetics scripts/test_processes \
	scripts/test_evaluate scripts/test_predict scripts/test_baselines scripts/test_main scripts/test_prepared \
	models/kernels/test_batch_norm_kernels models/kernels/test_kernel_compilation models/test_fused_network \
	models/kernels/test_lif_kernels models/test_resnet models/test_streaming models/test_initial_weights \
	$(addprefix utils/energy/,test_calls test_memory test_operations test_report test_spikes) \
	$(addprefix utils/prediction/,test_annotated test_frames test_stream) utils/pictures/test_recording utils/test_plots \
	dataset/test_prepare dataset/test_convert dataset/test_manifest \
	dataset/test_decode experiments/test_sweep helpers/test_helpers
check: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile $(SLOW:%=--ignore=tests/%.py)

test-gpu: $(READY)
	$(BIN)/python -m pytest -m "gpu or kernels"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)
	$(BIN)/python -m benchmarks.bench_step
	$(BIN)/python -m benchmarks.bench_decode $(CLIPS)
	$(BIN)/python -m benchmarks.bench_loader $(CLIPS)/kinetics400
	$(BIN)/python -m benchmarks.bench_index $(CLIPS)/hmdb51 $(CLIPS)/ucf101 $(CLIPS)/kinetics400
	$(BIN)/python -m benchmarks.bench_scaling
	$(BIN)/python -m benchmarks.bench_lif
	$(BIN)/python -m benchmarks.bench_heads ensemble_array
	$(BIN)/python -m benchmarks.bench_heads lmu
	$(BIN)/python -m benchmarks.memory_task

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
