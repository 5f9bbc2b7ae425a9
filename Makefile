# Every target works in a fresh checkout: it first makes .venv and installs what pyproject.toml asks for.
# PYTHON may name any interpreter from 3.11 to 3.13; by default the first one found is used, and for NEWEST the newest.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	if $$python -c '$(SUPPORTED)' 2>/dev/null; then echo $$python; break; fi; done)
NEWEST ?= $(shell for python in python3.13 python3.12 python3.11 python3 python; do \
	if $$python -c '$(SUPPORTED)' 2>/dev/null; then echo $$python; break; fi; done)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help demo test check format conform calibrate golden golden-check bench device-check docs fuzz test-slow test-processors test-loss test-peers test-exports test-newest wheel clean
help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/\1\t/p' $(MAKEFILE_LIST) | expand -t 12

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { \
		echo "selfattn needs Python 3.11, 3.12 or 3.13; got '$(PYTHON)'. Try: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all]' --group dev
	touch $@

demo: $(INSTALLED)  ## train a layer in PyTorch on real images, and run it in Keras and Flax
	$(BIN)/python -m examples.digits

# Two workers, which share out the files of tests, and processes of Keras as a whole (tests/processes.py). Files go in the
# order of their names, so that the slow ones, in tests/backends, come first. Libraries that each took a thread per core
# would wait for one another: on two cores the suite took a third longer.
test test-slow: export OMP_NUM_THREADS ?= 1
test test-slow: export OPENBLAS_NUM_THREADS ?= 1
test test-slow: export MKL_NUM_THREADS ?= 1
test test-slow: export TF_NUM_INTRAOP_THREADS ?= 1
# Tests run a program of JAX once or twice, so compiling it took most of their time. An XLA that has lost one of these flags
# ends and names it. `make conform`, test-slow and test-processors compile as users do.
test: export XLA_FLAGS ?= --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false
test: check  ## run check, then the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

test-slow: $(INSTALLED)  ## run the slow tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow

check: $(INSTALLED)  ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)  ## format the sources
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

conform: $(INSTALLED)  ## compare all backends with the numpy definition
	$(BIN)/selfattn conform

golden: $(INSTALLED)  ## write the missing golden vectors
	$(BIN)/python -m selfattn_core.conformance.release.golden golden-vectors

golden-check: $(INSTALLED)  ## compute all golden vectors again, and compare every bit
	$(BIN)/python -m selfattn_core.conformance.release.golden golden-vectors --check

calibrate: $(INSTALLED)  ## measure how near correct backends come to the limits, over 200 seeds (an hour)
	$(BIN)/python -m selfattn_core.conformance.release.calibrate
	$(BIN)/python -m selfattn_core.conformance.release.right

# DEVICE is a word of the frameworks' own, as in cuda:1; FRAMEWORKS is torch,jax,tensorflow or some of them, CELLS some
# groups of cells, and AGAINST another checkout, to be measured in turns with this one.
bench: $(INSTALLED)  ## measure time and memory into benchmarks/results, with DEVICE=cuda on that device
	$(BIN)/python -m pip install --quiet -c constraints.txt --group bench
	$(BIN)/python -m benchmarks.bench $(if $(DEVICE),--device $(DEVICE)) $(if $(FRAMEWORKS),--framework $(FRAMEWORKS)) \
		$(if $(CELLS),--group $(CELLS)) $(if $(AGAINST),--against $(AGAINST))

# With whatever is installed where PYTHON is, as on a borrowed machine; .venv has frameworks for the CPU.
device-check:  ## run conformance, times and a short training on DEVICE into build/device-check, within 8 minutes
	PYTHONPATH=$(CURDIR):$(CURDIR)/backends $(PYTHON) -m benchmarks.device_check --device $(or $(DEVICE),cuda) $(if $(SMALL),--small)

fuzz: $(INSTALLED)  ## 20,000 damaged files for each reader of checkpoints
	KERAS_BACKEND=tensorflow $(BIN)/python -m tests.porting.formats.fuzz

docs: $(INSTALLED)  ## build the site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test-processors: $(INSTALLED)  ## run every test under other instruction sets and numbers of threads
	$(BIN)/python -m tests.processors

test-loss: $(INSTALLED)  ## kill commands, fill disks, and write where it is forbidden (twenty minutes)
	$(BIN)/python -m tests.files.loss

# An environment of its own: packages of others must not change ours. Their own warnings are not ours to mend.
test-peers:  ## port and convert layers and networks of published packages
	test -d .venv-peers || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	.venv-peers/bin/python -m pip install --quiet -c constraints.txt -r tests/peers/libraries.txt
	.venv-peers/bin/python -m pip install --quiet --no-deps -r tests/peers/requirements.txt
	PYTHONPATH=.:backends .venv-peers/bin/python -m pytest tests/peers/check_peers.py tests/peers/check_networks.py -o filterwarnings=default

# An environment of its own: exporters and runtimes are many, large, and choose versions of what they share.
test-exports: export OMP_NUM_THREADS ?= 1
test-exports: export TF_NUM_INTRAOP_THREADS ?= 1
test-exports:  ## compare every exporter and runtime with the numpy definition, into docs/exports.md (an hour)
	test -d .venv-exports || $(PYTHON) -m venv .venv-exports
	.venv-exports/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	.venv-exports/bin/python -m pip install --quiet -c constraints.txt -e '.[all]' --group test --group exports
	.venv-exports/bin/python -m tests.exports

# Without constraints.txt. TORCH_INDEX may name an index that has builds of torch for the CPU.
test-newest:  ## compare the newest releases of the frameworks with the numpy definition, into docs/versions.md
	test -d .venv-newest || $(NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	.venv-newest/bin/python -m tests.packaging.newest $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

wheel: $(INSTALLED)  ## build the wheel into dist/
	$(BIN)/python -m build --wheel

clean:  ## remove the environment and everything built
	rm -rf .venv .venv-peers .venv-exports .venv-newest build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
