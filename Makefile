# Everything happens in .venv; nothing has to be installed by hand.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
PIP    := $(VENV)/bin/pip install -q -c constraints.txt

# Threads that wait sleep instead of spinning: beside another busy process a spinning one keeps the core from the
# very thread that it waits for.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo films chain test test-triton base lint clean

$(VENV)/run: pyproject.toml constraints.txt          # enough to train, sample and plot
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[plots]'
	@touch $@

$(VENV)/dev: $(VENV)/run                             # plus the test runner and the oracles
	$(PIP) -e '.[plots,dev,importers,parity,evaluate,tensorboard]'
	@touch $@

# The method in the micro-world: trains an adapter, films subjects never seen, measures, writes out/demo/index.html.
demo: $(VENV)/run
	$(RUN) -m microworld.demo

# The whole chain on real photos and clips with a tiny random model: 20 steps of both tasks, then one video.
TINY := --height 96 --width 144 --frames 9 --fps 8
chain: $(VENV)/run
	rm -rf out/chain
	$(RUN) -m weights.tiny out/chain/tiny
	$(RUN) train.py --backbone out/chain/tiny --pairs tests/media/pairs --clips tests/media/clips --out out/chain/run \
		$(TINY) --steps 20 --p-video 0.5 --identity-batch 2 --accumulate 1 --rank 16 --alpha 16 --lr 0.01 --warmup 1
	$(RUN) sample.py --backbone out/chain/tiny --adapter out/chain/run/step-000020/adapter.safetensors \
		--ref tests/media/pairs/lawn.jpg --prompt "two white dogs run along a beach" --out out/chain/video $(TINY) --steps 20

# Two processes of one thread each end sooner on two cores than one process of two threads: benchmarks/README.md.
JOBS ?= 2
test: $(VENV)/dev lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest test_kernels.py tests -n $(JOBS) --dist worksteal

# The kernels on another version of Triton, laid over the one that torch brings: make test-triton TRITON=3.6.0
TRITON ?= 3.6.0
test-triton: $(VENV)/dev
	$(VENV)/bin/pip install -q --no-deps --target out/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=out/triton-$(TRITON) $(RUN) -m pytest test_kernels.py
	PYTHONPATH=out/triton-$(TRITON) $(RUN) -m pytest tests/test_hopper.py
	PYTHONPATH=out/triton-$(TRITON) $(RUN) -m kernels.bench --lint --sample

# The micro-world's base model from nothing, on a GPU if there is one; every stage goes on where it was stopped.
base: $(VENV)/run
	for stage in new vae whiten latents dit score; do $(RUN) -m microworld.pretrain --stage $$stage || exit 1; done

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) out

# The moving picture on the front page.
films: $(VENV)/run
	$(RUN) -m microworld.strip
