# dsa.h needs no build: it is one header. This builds its tools, tests and examples into build/.
# `make` alone prints the targets. A C compiler and make are enough for all of them except check and BLIS=1.

CC ?= cc
CFLAGS ?= -O3
WARN = -std=c99 -Wall -Wextra -pedantic -Wconversion
LIBS = -lm -pthread

# BLIS=1: the tools' dense projections through BLIS (Debian: libblis-dev) instead of the built-in GEMM.
BLIS_CFLAGS_1 = -DDSA_BLIS
BLIS_LIBS_1 = -lblis
BLIS_CFLAGS = $(BLIS_CFLAGS_$(BLIS))
BLIS_LIBS = $(BLIS_LIBS_$(BLIS))

BUILD = $(CC) $(CFLAGS) $(WARN)
TOOLS = build/conformance build/generate build/needle build/demo build/bench
EXAMPLES = build/01_quick_start build/02_paged_attention build/03_decode_step build/04_layer build/05_sharded_attention
TEST_OBJECTS = build/impl.o build/main.o build/test_numeric.o build/test_select.o build/test_score.o \
	build/test_cache.o build/test_attend.o build/test_step.o build/test_layer.o build/test_threads.o build/test_random.o \
	build/test_errors.o build/test_golden.o build/test_backward.o
TEST_HEADERS = dsa.h tests/harness.h tests/brute.h tests/fixture.h tests/ref_layer.h examples/safetensors.h
TOOL_HEADERS = dsa.h tools/engine.h tools/needle.h tools/blis.h tools/conformance_kernels.h tools/conformance_model.h \
	tools/conformance_report.h tools/bench.h tools/bench_data.h examples/safetensors.h

help:
	@echo 'make tools        build/conformance build/generate build/needle build/demo build/bench'
	@echo 'make demo         a trained model finds facts in a long text (under 3 minutes)'
	@echo 'make test         build and run the test suite (under 5 minutes)'
	@echo 'make check        compile matrix, sanitizers, qemu, fuzzing, examples, conformance (about 8 minutes)'
	@echo 'make bench        time the library beside what this machine can do (2 minutes)'
	@echo 'make bench-sweep  one layer from 1K to 1M tokens, dense beside DSA: build/sweep.csv, build/sweep.png'
	@echo 'make bench-peers  the same work by the GEMMs of oneDNN, OpenBLAS and BLIS, where they are installed'
	@echo 'make examples     build the numbered examples'
	@echo 'make conformance  compare the library with the reference vectors'
	@echo 'make clean        remove build/'
	@echo 'Settings: CC=cc CFLAGS=-O3, BLIS=1 for the tools with BLIS'

tools: $(TOOLS)

demo: build/demo
	build/demo

test: build/test
	build/test

check: build/test $(TOOLS)
	CC='$(CC)' sh tests/check.sh

bench: build/bench
	build/bench

bench-sweep: build/bench
	build/bench --sweep build/sweep.csv
	python3 tools/plot.py build/sweep.csv build/sweep.png

bench-peers:
	CC='$(CC)' CFLAGS='$(CFLAGS)' sh tools/bench_peers.sh '$(WARN)'
	build/bench_peers

examples: $(EXAMPLES)

conformance: build/conformance
	build/conformance tests/vectors/*.safetensors
	build/conformance --model examples/tiny-dsa examples/tiny-dsa/reference.safetensors

clean:
	rm -rf build

# Rewritten when the compiler or its flags change, so that nothing built with other ones is kept.
build/flags: always
	@mkdir -p build
	@echo '$(BUILD) $(BLIS_CFLAGS)' | cmp -s - $@ || echo '$(BUILD) $(BLIS_CFLAGS)' > $@
always:

build/test: $(TEST_OBJECTS)
	$(CC) $(CFLAGS) -o $@ $(TEST_OBJECTS) $(LIBS)

$(TEST_OBJECTS): build/%.o: tests/%.c $(TEST_HEADERS) build/flags
	$(BUILD) -c -o $@ $<

$(TOOLS): build/%: tools/%.c $(TOOL_HEADERS) build/flags
	$(BUILD) $(BLIS_CFLAGS) -DDSA_BUILD='"$(BUILD)"' -o $@ $< $(BLIS_LIBS) $(LIBS)

$(EXAMPLES): build/%: examples/%.c dsa.h examples/safetensors.h build/flags
	$(BUILD) -o $@ $< $(LIBS)

.PHONY: help tools demo test check bench bench-sweep bench-peers examples conformance clean always
