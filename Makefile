# The same verbs that .ci/run calls. PYTHON may name another interpreter.
PYTHON ?= .venv/bin/python

.PHONY: style quality test benchmark

style:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

quality:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest

benchmark:
	for name in masking pretraining_step feature_extraction input_pipeline end_to_end; do \
		$(PYTHON) benchmarks/speed/$$name.py || exit 1; \
	done
