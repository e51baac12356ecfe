# Everything happens in .venv; nothing has to be installed by hand.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
PIP    := $(VENV)/bin/pip install -q -c constraints.txt

.PHONY: demo test lint clean

$(VENV)/run: pyproject.toml constraints.txt          # enough to train and sample
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@touch $@

$(VENV)/dev: $(VENV)/run                             # plus the test runner and the oracles
	$(PIP) -e '.[dev,plots,parity]'
	@touch $@

test: $(VENV)/dev lint
	$(RUN) -m pytest tests
	$(RUN) -m pytest test_kernels.py

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) out
