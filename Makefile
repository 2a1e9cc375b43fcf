.PHONY: help install check test demo bench clients browser conformance bundle
PY := .venv/bin/python

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

install: .venv/installed ## .venv with the package, tests and checkers

.venv/installed: pyproject.toml
	python3 -m venv .venv
	.venv/bin/pip install -q -e ".[test]" "ruff>=0.17,<0.18" "pyright>=1.1.414,<2" "deptry>=0.25,<1"
	touch $@

check: install ## style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m deptry .
	$(PY) -m pyright --pythonpath $(PY)

test: install ## all tests that need nothing else
	$(PY) -m pytest -q

demo: install ## a picture without key or network
	$(PY) -P -m evolink_mcp demo

bench: install ## every promised figure, as ratios
	$(PY) -m benchmarks

clients: install ## clients that others wrote (npm and pip needed)
	bash tests/clients/run.sh $(PY)

browser: install ## the gallery in a real browser (chromium and npm needed)
	bash tests/browser/run.sh $(PY)

conformance: install ## the protocol's own conformance suite (npm needed)
	bash tests/conformance/run.sh $(PY)

bundle: ## the Claude Desktop bundle (npm needed)
	npm install --ignore-scripts --no-package-lock --no-audit --no-fund --prefix .github/release
	.github/release/node_modules/.bin/mcpb pack . evolink-mcp.mcpb
