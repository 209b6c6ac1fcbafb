# The same verbs that .ci/run calls. PYTHON may name another interpreter.
PYTHON ?= .venv/bin/python

.PHONY: style quality test docs benchmark

style:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

quality:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest

docs:
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

benchmark:
	for name in masking pretraining_step feature_extraction input_pipeline end_to_end opening checkpoint choices; do \
		$(PYTHON) benchmarks/speed/$$name.py || exit 1; \
	done
