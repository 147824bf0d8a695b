# The project's commands. `make` alone lists them.
#
# Two environments, made on first use and kept: .venv for the tools and tests, .webui/venv for a real
# Open WebUI. Neither touches anything outside this folder. Their stamps carry what they hold: a
# changed pin or pyproject.toml installs again, otherwise nothing is done.

# torch is pinned beside Open WebUI, which leaves it open: one version, tested, the same everywhere.
WEBUI_PINS := torch==2.13.0 open-webui==0.12.4
WEBUI_PYTHON := .webui/venv/bin/python
WEBUI_STAMP := .webui/venv/installed@$(subst ==,-,$(subst $() ,_,$(WEBUI_PINS)))
DEV_STAMP := .venv/dev@installed
E2E_STAMP := .venv/e2e@installed

# The first of these that is Python 3.11 or 3.12 and can make a virtual environment.
FIND_PYTHON = for python in $(PYTHON) python3.12 python3.11 python3 python; do \
  "$$python" -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
    2>/dev/null && break; python=; done; \
  if [ -z "$$python" ]; then \
    echo "Python 3.11 or 3.12 with its venv module is needed (Debian: apt install python3-venv);" \
      "PYTHON=/path/to/python chooses one." >&2; exit 1; fi

.PHONY: help run test webui e2e bench soak check clean
.DEFAULT_GOAL := help

help:  ## list these commands
	@sed -n 's/^\([a-z0-9]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

run: $(WEBUI_STAMP)  ## start Open WebUI with the pipe in it (PORT=8080, OPENROUTER_API_KEY=sk-or-…)
	@exec $(WEBUI_PYTHON) -m openrouter_responses_pipe run $(if $(PORT),--port '$(PORT)')

# Most tests wait for a server, so two run at a time; those of faults measure who waits, so they run alone.
FAULTS := tests/test_artifact_faults.py
test: $(DEV_STAMP)  ## run every test that needs no Open WebUI
ifdef ARGS
	.venv/bin/python -m pytest tests --ignore=tests/e2e --ignore=tests/bench $(ARGS)
else
	.venv/bin/python -m pytest $(FAULTS)
	.venv/bin/python -m pytest tests --ignore=tests/e2e --ignore=tests/bench --ignore=$(FAULTS) -n 2 --dist loadfile
endif

webui: $(WEBUI_STAMP)  ## install Open WebUI for `run` and `e2e`

e2e: $(E2E_STAMP) $(WEBUI_STAMP)  ## run the tests against a real Open WebUI and a real Chromium
	.venv/bin/python -m pytest tests/e2e $(ARGS)

bench: $(DEV_STAMP)  ## measure loading and streaming
	.venv/bin/python -m tests.bench $(ARGS)

soak: $(DEV_STAMP)  ## ten minutes of people who come and go (SECONDS=600): nothing may fail, nothing may grow
	.venv/bin/python -m tests.soak --seconds $(or $(SECONDS),600)

check: $(DEV_STAMP) $(E2E_STAMP)  ## ruff and pyright
	.venv/bin/ruff check .
	.venv/bin/pyright

clean:  ## remove both environments, the demo's data and every cache
	rm -rf .venv .webui .e2e .pytest_cache .ruff_cache .hypothesis *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(WEBUI_STAMP):
	@$(FIND_PYTHON); exec "$$python" .ci/make_venv.py .webui/venv $@ $(WEBUI_PINS)

$(DEV_STAMP): pyproject.toml
	@$(FIND_PYTHON); exec "$$python" .ci/make_venv.py .venv $@ -e '.[dev]'

$(E2E_STAMP): pyproject.toml | $(DEV_STAMP)
	@$(FIND_PYTHON); exec "$$python" .ci/make_venv.py .venv $@ -e '.[dev,e2e]'
