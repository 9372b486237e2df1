# `make demo` and `make test` work from a bare clone; both make their own environment in .venv.
.POSIX:

bin = .venv/bin
# Two single-threaded processes finish a suite four times sooner than two that fight for the same two cores.
quiet = MPLBACKEND=agg PYTHONWARNINGS=ignore
single = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(quiet)
PYTHON =
WORKERS = 2

help:
	@echo 'make demo    train a pitch/timbre system on rendered notes, score it, write sounds to out/demo/'
	@echo 'make test    everything: drift, lint, site, links, notebooks, contract suites, browser'
	@echo 'make check   the quick half: drift, lint, house rules'
	@echo 'make docs    the site, in _site/'
	@echo 'make hooks   git hooks: clean and merge notebooks, `make check` before a commit'

demo:
	@PYTHON='$(PYTHON)' sh tools/environment.sh soundfont
	$(quiet) $(bin)/disentangle_demo

environment:
	@PYTHON='$(PYTHON)' sh tools/environment.sh dev,docs

drift: environment
	$(single) $(bin)/python tools/drift.py
	$(bin)/ruff check -q disentangle_nb nbs tools tests docs setup.py

check: drift
	$(single) $(bin)/python -m pytest -q tests/test_house.py

docs: environment
	$(single) $(bin)/python tools/build_site.py _site
	$(bin)/python tools/check_links.py _site

test: drift docs
	$(single) $(bin)/python -m pytest -q --tb=short -n $(WORKERS) --dist worksteal -rs --durations=5 --durations-min=20 tests

hooks: environment
	$(bin)/nbdev_install_hooks
	cp tools/pre-commit .git/hooks/pre-commit && chmod +x .git/hooks/pre-commit

.PHONY: help demo environment drift check docs test hooks
