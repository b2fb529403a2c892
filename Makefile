# make demo   everything from nothing to a guest on a lazily fetched image
# make test   every test, the guest included
# make help   the rest

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
CC ?= cc
CLANG ?= clang
BUILD := build

CSTD := -std=c11 -D_GNU_SOURCE -Icsrc
CWARN := -Wall -Wextra -Werror -Wshadow -Wno-unused-parameter -Wno-missing-field-initializers
CLIBS := -lzstd -llz4 -lz -lcrypto -lpthread
# The engine's folders. Each may use itself and those before it, no other (tests/test_house.py holds it).
LAYERS := base blob cache store fs rafs disk passthrough fuse vhost fusedev precontent
CSRC := $(sort $(foreach d,$(LAYERS),$(wildcard csrc/$(d)/*.c)))
CHDR := csrc/vnd.h $(foreach d,$(LAYERS),$(wildcard csrc/$(d)/*.h))
# FOLDER/test_FILE, one for each source that has a C test
CTESTS := $(patsubst tests/c/%.c,%,$(sort $(wildcard tests/c/*/test_*.c)))
FUZZERS := $(patsubst tests/fuzz/%.c,%,$(sort $(wildcard tests/fuzz/fuzz_*.c)))
SAN := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer

.PHONY: help deps venv build guest demo test check format hooks tidy coverage python-coverage other-tests ctest asan tsan fuzz fuzz-coverage bench bench-cold-start clean

help:
	@sed -n 's/^# make/make/p' Makefile; echo "make build check format hooks tidy coverage ctest asan tsan fuzz fuzz-coverage bench bench-cold-start clean"

deps:
	@scripts/install-packages

# The environment is made anew when pyproject.toml changes, the engine when a C file does.
$(VENV)/.ready: pyproject.toml | deps
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install -q --upgrade pip "setuptools>=77" wheel
	@$(PY) scripts/list-requirements.py | $(PY) -m pip install -q -r /dev/stdin
	@touch $@

venv: $(VENV)/.ready

$(VENV)/.built: $(VENV)/.ready $(CSRC) $(CHDR) $(wildcard csrc/fakeguest/*) setup.py $(wildcard virtiofsd_nydus/*_build.py)
	@$(PY) -m pip install -qq --no-build-isolation --no-deps -e .
	@touch $@

build: $(VENV)/.built

# ---- C tests and fuzzers: no Python needed. Each kind has its own objects of csrc/, made once.
# $(1) kind, $(2) compiler, $(3) flags of objects, $(4) flags of programs, $(5) where the programs' sources are
define kind
$(BUILD)/$(1)/obj/%.o: csrc/%.c
	@mkdir -p $$(@D)
	@$(2) $(CSTD) $(3) -MMD -MP -c $$< -o $$@
$(BUILD)/$(1)/%: $(5)/%.c $(patsubst csrc/%.c,$(BUILD)/$(1)/obj/%.o,$(CSRC)) $(CHDR) $(wildcard $(5)/*.h)
	@mkdir -p $$(@D)
	@$(2) $(CSTD) -I$(5) $(4) $$(filter %.c %.o,$$^) -o $$@ $(CLIBS)
-include $(wildcard $(BUILD)/$(1)/obj/*/*.d)
endef
$(eval $(call kind,c,$(CC),$(CWARN) -O1 -g,$(CWARN) -O1 -g,tests/c))
$(eval $(call kind,asan,$(CC),$(CWARN) -O1 -g $(SAN),$(CWARN) -O1 -g $(SAN),tests/c))
$(eval $(call kind,tsan,$(CC),$(CWARN) -Wno-tsan -O1 -g -fsanitize=thread,$(CWARN) -Wno-tsan -O1 -g -fsanitize=thread,tests/c))
$(eval $(call kind,cov,$(CC),$(CWARN) -O0 -g --coverage -fprofile-update=atomic,$(CWARN) -O0 -g --coverage,tests/c))
$(eval $(call kind,fuzz,$(CLANG),-O1 -g $(SAN) -fsanitize=fuzzer-no-link,-O1 -g $(SAN) -fsanitize=fuzzer,tests/fuzz))
# Objects are kept between runs
.SECONDARY:
JOBS := $(shell nproc)

# Runs all C tests, a program a core at a time. One program or case: build/c/FOLDER/test_FILE [NAME]
ctest:
	@$(MAKE) -s --no-print-directory -j$(JOBS) $(addprefix $(BUILD)/c/,$(CTESTS))
	@printf '%s\n' $(addprefix $(BUILD)/c/,$(CTESTS)) | xargs -P $(JOBS) -n 1 env

# ---- sanitizers: the C tests, then the Python tests that drive the engine, with the engine built to match
$(BUILD)/asan-tree/.built: $(VENV)/.ready $(CSRC) $(CHDR) $(wildcard csrc/fakeguest/*) setup.py
	@scripts/build-sanitized $(PY) $(BUILD)/asan-tree "$(SAN)"
	@touch $@

asan: $(BUILD)/asan-tree/.built
	@$(MAKE) -s --no-print-directory -j$(JOBS) $(addprefix $(BUILD)/asan/,$(CTESTS))
	@printf '%s\n' $(addprefix $(BUILD)/asan/,$(CTESTS)) | xargs -P $(JOBS) -n 1 env
	@scripts/run-sanitized $(PY) $(BUILD)/asan-tree -q -m "not guest" tests/fakeguest tests/vhost tests/fuse/test_mount.py tests/fuse/test_passthrough.py tests/passthrough

tsan:
	@$(MAKE) -s --no-print-directory -j$(JOBS) $(addprefix $(BUILD)/tsan/,$(CTESTS))
	@printf '%s\n' $(addprefix $(BUILD)/tsan/,$(CTESTS)) | xargs -P $(JOBS) -n 1 env

# ---- fuzzers: FUZZ_SECONDS each, from the kept corpus
FUZZ_SECONDS ?= 20
fuzz:
	@$(MAKE) -s --no-print-directory -j$(JOBS) $(addprefix $(BUILD)/fuzz/,$(FUZZERS))
	@for f in $(FUZZERS); do \
		mkdir -p $(BUILD)/corpus/$$f tests/fuzz/corpus/$$f; \
		$(BUILD)/fuzz/$$f -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=2048 -verbosity=0 -print_final_stats=0 \
			-artifact_prefix=$(BUILD)/corpus/ $(BUILD)/corpus/$$f tests/fuzz/corpus/$$f || exit 1; \
		echo "$$f: clean for $(FUZZ_SECONDS) s"; \
	done

# Lines of its files that each image target's kept corpus covers
fuzz-coverage:
	@scripts/fuzz-coverage

# ---- the two commands of the README, and what they stand on
PYSRC := virtiofsd_nydus tests scripts vm-images setup.py
CFORMAT = $(shell git ls-files 'csrc/*.[ch]' 'tests/*.[ch]' 'vm-images/*.c' | grep -v /corpus/)

format: build
	@$(VENV)/bin/ruff format -q $(PYSRC)
	@$(VENV)/bin/clang-format -i $(CFORMAT)

check: build
	@$(VENV)/bin/ruff check $(PYSRC)
	@$(VENV)/bin/ruff format --check -q $(PYSRC)
	@$(VENV)/bin/clang-format --dry-run -Werror $(CFORMAT)
	@$(VENV)/bin/codespell
	@! git grep -nIE '[[:space:]]+$$' -- . ':!*/corpus/*' ':!*.svg' ':!*.patch'
	@$(VENV)/bin/mypy
	@$(MAKE) --no-print-directory ctest

# The same checks on the files of each commit, before it is made
hooks: build
	@$(PY) -m pip install -q "pre-commit~=4.7"
	@$(VENV)/bin/pre-commit install

# clang-tidy's bug-finding checks; .clang-tidy says which are left out and why. Two minutes of processor time.
tidy: build
	@printf '%s\n' $(CSRC) | xargs -P $(JOBS) -n 4 sh -c '$(VENV)/bin/clang-tidy -quiet "$$@" -- $(CSTD)' tidy

# ---- coverage, held at tests/coverage_floors.toml: of csrc by the C tests, of the package by those Python tests that run
# it in their own process
COVERED_BY := tests/net tests/storage tests/oci tests/rafs tests/reader tests/cli tests/daemon tests/vhost tests/store
coverage: build
	@$(MAKE) -s --no-print-directory -j$(JOBS) $(addprefix $(BUILD)/cov/,$(CTESTS))
	@find $(BUILD)/cov -name '*.gcda' -delete
	@printf '%s\n' $(addprefix $(BUILD)/cov/,$(CTESTS)) | xargs -P $(JOBS) -n 1 env >/dev/null
	@$(PY) scripts/coverage-floors csrc

python-coverage: build
	@$(PY) -m coverage run -m pytest -q $(COVERED_BY)
	@$(PY) scripts/coverage-floors python

# The other Python tests: with python-coverage, all of them
other-tests: build
	@$(PY) -m pytest -q $(addprefix --ignore=,$(COVERED_BY))

# Every test once; the part that measures coverage of the Python package holds its floor
test: check guest
	@$(MAKE) --no-print-directory python-coverage
	@$(MAKE) --no-print-directory other-tests

guest: | deps
	@vm-images/build.py

demo: build guest
	@$(PY) scripts/demo.py

bench: build
	@$(VENV)/bin/virtiofsd-nydus bench io

bench-cold-start: build guest
	@scripts/bench-cold-start

clean:
	@rm -rf $(BUILD) $(VENV)/.built virtiofsd_nydus/*.so *.egg-info
