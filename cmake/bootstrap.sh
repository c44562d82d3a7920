#!/usr/bin/env bash
# Installs what building chela needs, with apt. Silent and quick when nothing is missing; never asks.
set -euo pipefail

readonly cmake_minimum=3.25
readonly library_packages=(
  libeigen3-dev        # the one dependency of the library
  doctest-dev          # tests
  libbenchmark-dev     # benchmarks
  libcli11-dev         # examples
  nlohmann-json3-dev   # examples
  libboost-context-dev # tests that run CUDA kernels on the CPU
  perl-doc             # the text that the demo learns from
)

fail() {
  echo "bootstrap: $*" >&2
  exit 1
}

cmake_version() { cmake --version 2>/dev/null | sed -n '1s/^cmake version \([0-9.]*\).*/\1/p'; }

# Whether dotted version $1 is $2 or later.
at_least() { [[ -n $1 && $(printf '%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]]; }

# Programs count wherever they come from; libraries are asked of the package manager.
missing=()
[[ -n ${CXX:-} ]] || command -v c++ >/dev/null || missing+=(g++)
at_least "$(cmake_version)" "$cmake_minimum" || missing+=(cmake)
command -v ninja >/dev/null || missing+=(ninja-build)
if command -v dpkg-query >/dev/null; then
  installed=" $(dpkg-query -W -f '${db:Status-Status}=${Package} ' "${library_packages[@]}" 2>/dev/null || true)"
  for package in "${library_packages[@]}"; do
    [[ $installed == *" installed=$package "* ]] || missing+=("$package")
  done
else
  missing+=("${library_packages[@]}")
fi
(( ${#missing[@]} == 0 )) && exit 0

command -v apt-get >/dev/null || fail "no apt here; install the counterparts of these Debian packages: ${missing[*]}"
as_root=()
if (( EUID != 0 )); then
  command -v sudo >/dev/null || fail "need root, or sudo, to install: ${missing[*]}"
  as_root=(sudo -n)
fi

echo "bootstrap: installing ${missing[*]}"
apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 "$@" </dev/null; }
log=$(mktemp)
trap 'rm -f "$log"' EXIT
{ apt update && apt install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 || {
  cat "$log" >&2
  fail "apt-get could not install: ${missing[*]}"
}
hash -r
at_least "$(cmake_version)" "$cmake_minimum" ||
  fail "cmake $cmake_minimum or later is needed and this system packages $(cmake_version); get one from cmake.org"
