# make demo    set up, then train on handwritten digits, from image folder to accuracy
# make test    set up, then run the tests
# make check   set up, then check format, lint and types
# make format  set up, then format the code and mend what lint can mend
# make setup   make .venv (PYTHON=python3.12 picks the interpreter); does nothing where that is done

.PHONY: demo test check format setup
.DEFAULT_GOAL := demo
python := .venv/bin/python

demo: setup
	@bash launch/demo.sh

test: setup
	$(python) -m pytest $(PYTEST_ARGS)

check: setup
	$(python) -m ruff format --check .
	$(python) -m ruff check .
	$(python) -m mypy

format: setup
	$(python) -m ruff format .
	$(python) -m ruff check --fix .

setup:
	@bash launch/setup.sh
