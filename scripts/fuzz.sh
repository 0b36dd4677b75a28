#!/bin/sh
# Runs each fuzz target of the module for a while: fuzz.sh [SECONDS-EACH]
set -eu
seconds=${1:-10}
out=$(mktemp)
trap 'rm -f "$out"' EXIT
for file in $(git ls-files '*_test.go'); do
	for target in $(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$file"); do
		echo "fuzz $target for $seconds s ($file)"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "${seconds}s" -fuzzminimizetime 10x "./$(dirname "$file")" >"$out" 2>&1 || {
			cat "$out"
			exit 1
		}
	done
done
