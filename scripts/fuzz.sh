#!/bin/sh
# Runs each fuzz target of the module for a while: fuzz.sh [SECONDS-EACH]
set -eu
seconds=${1:-10}
for package in $(go list ./...); do
	for target in $(go test -list '^Fuzz' "$package" | grep '^Fuzz' || true); do
		echo "fuzz $package $target ${seconds}s"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "${seconds}s" "$package" >fuzz.out 2>&1 || {
			cat fuzz.out
			exit 1
		}
	done
done
rm -f fuzz.out
