# SPDX-License-Identifier: Apache-2.0
# The front door: make demo, make test, make help. The build itself is CMake's (CMakePresets.json).
PACKAGES = cmake g++ ninja-build pkg-config catch2 libbenchmark-dev libcli11-dev libhwy-dev libxxhash-dev nlohmann-json3-dev
PREFIX = /usr/local
FORMAT = -i
JOBS = $(shell nproc)
CMAKE_FLAGS =

.DEFAULT_GOAL = help
.PHONY: help demo test build bench install clean format packages configure

help: ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## /  make \1\t/p' Makefile | expand -t 20
	@echo '  Variables: CUDA=1 (build the kernels too, with the nvcc that is there)  PREFIX=$(PREFIX)  JOBS=$(JOBS)  CMAKE_FLAGS=  PACKAGES= (empty: look for no packages)'

demo: configure ## compress the bundled keys and values of a real model, at every preset
	cmake --build build --target tqkv_cli -j $(JOBS)
	build/tqkv demo

test: build ## build all and run the tests, about 5 minutes on two cores
	ctest --preset default -j $(JOBS)

build: configure ## the library, the tqkv command, the tests and tqkv-bench, in build/
	cmake --build build -j $(JOBS)

bench: configure ## run the benchmarks
	cmake --build build --target tqkv_bench -j $(JOBS)
	build/tqkv-bench

install: build ## install below PREFIX
	cmake --install build --prefix $(PREFIX)

format: ## clang-format every source
	clang-format $(FORMAT) $$(find include src kernels tests bench -name '*.[ch]' -o -name '*.[ch]pp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

clean: ## remove build/
	cmake -E rm -rf build

configure: packages
	cmake --preset default -DTQKV_CUDA=$(if $(filter-out 0,$(CUDA)),ON,OFF) $(CMAKE_FLAGS)

packages:
	@missing=; for p in $(PACKAGES); do \
	  dpkg-query -W -f '$${db:Status-Status}\n' $$p 2>/dev/null | grep -qx installed || missing="$$missing $$p"; done; \
	test -n "$$missing" || exit 0; \
	if ! command -v apt-get >/dev/null; then \
	  echo "This is not Debian. Install the like of these packages, then add PACKAGES= to the command:$$missing" >&2; exit 1; fi; \
	echo "Installing Debian packages:$$missing"; \
	root=; test $$(id -u) = 0 || root=sudo; \
	$$root apt-get update -q && $$root env DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends $$missing
