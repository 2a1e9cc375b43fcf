.PHONY: help install check test demo bench clients browser conformance bundle
PY := .venv/bin/python

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

install: .venv/installed ## create .venv with the package and all tools

.venv/installed: pyproject.toml
	python3 -m venv .venv
	.venv/bin/pip install -q -e ".[test]" "ruff>=0.17,<0.18" "pyright>=1.1.414,<2" "deptry>=0.25,<1"
	touch $@

check: install ## style, types and declared dependencies
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m deptry .
	$(PY) -m pyright --pythonpath $(PY)

test: install ## tests that need no other program
	$(PY) -m pytest -q

demo: install ## create an image without key or network
	$(PY) -P -m evolink_mcp demo

bench: install ## measure all speed targets
	$(PY) -m benchmarks

clients: install ## published MCP clients (needs npm and pip)
	bash tests/clients/run.sh $(PY)

browser: install ## the gallery in a browser (needs chromium and npm)
	bash tests/browser/run.sh $(PY)

conformance: install ## the conformance suite of the protocol (needs npm)
	bash tests/conformance/run.sh $(PY)

bundle: ## the Claude Desktop bundle (needs npm)
	npm install --ignore-scripts --no-package-lock --no-audit --no-fund --prefix .github/release
	.github/release/node_modules/.bin/mcpb pack . evolink-mcp.mcpb
