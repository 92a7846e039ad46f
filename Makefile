# make demo    set up, then train on handwritten digits, from image folder to accuracy
# make test    set up, then run the tests
# make check   set up, then check format, lint, types and spelling
# make format  set up, then format the code and mend what lint can mend
# make doctor  print what this machine lacks, and the commands that fix it; DOCTOR_ARGS="--data FILE --json" passes arguments on
# make ffcv-wheel  build FFCV into dist/ with OpenCV and TurboJPEG inside, for machines without compiler or root
# make gpu-bundle  pack into dist/gpu what a bare machine with a GPU lacks for benchmarks/gpu_check.sh; BUNDLE_ARGS="--data FOLDER"
# make setup   make .venv (PYTHON=python3.12 picks the interpreter); does nothing where that is done

.PHONY: demo test check format doctor ffcv-wheel gpu-bundle setup
.DEFAULT_GOAL := demo
python := .venv/bin/python

demo: setup
	@bash launch/demo.sh

test: setup
	$(python) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

check: setup
	$(python) -m ruff format --check .
	$(python) -m ruff check .
	$(python) -m mypy
	.venv/bin/codespell

format: setup
	$(python) -m ruff format .
	$(python) -m ruff check --fix .

# Works before and without setup, and also if the Python of .venv was removed.
doctor:
	$(shell $(python) -c "" 2>/dev/null && echo $(python) || echo python3) -m imagenet_training.doctor $(DOCTOR_ARGS)

ffcv-wheel:
	@bash launch/ffcv_wheel.sh

gpu-bundle: setup
	@bash benchmarks/gpu_bundle.sh $(BUNDLE_ARGS)

setup:
	@bash launch/setup.sh
