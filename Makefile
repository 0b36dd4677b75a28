# Targets:
#   make run [IMAGE=disk.qcow2]  serve a disk on a unix socket and loopback TCP, with metrics, until Ctrl-C
#   make test                    install what the tests need, then lint, unit and integration tests, fuzz, cross-build
#   make test-long               the same with more seeds and minutes of fuzzing
#   make bench                   time nbdserve against qemu-nbd and nbdkit
#   make lint fuzz build install clean
#
# Go 1.26 or later on PATH is the one prerequisite.

SHELL       := /bin/sh
PREFIX      ?= /usr/local
DESTDIR     ?=
IMAGE       ?=
FUZZ        ?= 10
BENCHFLAGS  ?= --dirs /dev/shm --transports unix
VERSION     := $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
GOBUILD      = CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)'
BIN         := bin/nbdserve

.PHONY: all build go deps run test test-long unit cross bench lint fuzz install clean

all: build

go:
	@v=$$(go env GOVERSION 2>/dev/null | sed -n 's/^go1\.\([0-9]*\).*/\1/p'); \
	if [ "$${v:-0}" -lt 26 ]; then echo "nbdserve needs Go 1.26 or later on PATH, found: $$(go env GOVERSION 2>/dev/null || echo none) (https://go.dev/dl)" >&2; exit 1; fi

build: go
	$(GOBUILD) -o $(BIN) ./cmd/nbdserve

run: build
	@scripts/demo.sh $(BIN) $(IMAGE)

deps:
	@scripts/deps.sh

test: go deps lint build unit cross
	@scripts/fuzz.sh 3

test-long: export NBDSERVE_LONG := 1
test-long: go deps lint build cross
	go test -race -count=1 -timeout 3h ./...
	@scripts/fuzz.sh 300

unit:
	go test -race -timeout 45m ./...

cross:
	GOARCH=arm64 CGO_ENABLED=0 go build -o /dev/null ./cmd/nbdserve
	GOARCH=arm64 CGO_ENABLED=0 go vet ./...

bench: build deps
	go build -o bin/nbdload ./bench/nbdload
	bench/nbdbench.py --nbdserve $(BIN) --client bin/nbdload $(BENCHFLAGS)
	bench/nbdbench.py --nbdserve $(BIN) $(BENCHFLAGS)

lint: go
	@scripts/lint.sh

fuzz: go
	@scripts/fuzz.sh $(FUZZ)

install: build
	install -D -m 755 $(BIN) $(DESTDIR)$(PREFIX)/bin/nbdserve
	install -D -m 644 docs/nbdserve.1 $(DESTDIR)$(PREFIX)/share/man/man1/nbdserve.1
	install -D -m 644 systemd/nbdserve@.service $(DESTDIR)$(PREFIX)/lib/systemd/system/nbdserve@.service
	install -D -m 644 systemd/nbdserve@.socket $(DESTDIR)$(PREFIX)/lib/systemd/system/nbdserve@.socket
	install -D -m 644 systemd/nbdserve.sysusers $(DESTDIR)$(PREFIX)/lib/sysusers.d/nbdserve.conf

clean:
	rm -rf bin
