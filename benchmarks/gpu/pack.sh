#!/bin/sh
# Packs what kvkeep needs on a GPU host without network, beside vLLM: the compiled page copier for
# any CPython from 3.11 on, its one header for a build there, and the packages vLLM does not bring.
#
#     benchmarks/gpu/pack.sh [DEST]        # default .gpu/native, which git ignores
set -eu
cd "$(dirname "$0")/../.."
dest=${1:-.gpu/native}
python=${PYTHON:-python3}
rm -rf "$dest"
mkdir -p "$dest"
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
gcc -shared -fPIC -O3 -std=c11 -Wall -Wextra "-I$include" \
    src/kvkeep/transfer/_pages.c src/kvkeep/transfer/_arrivals.c \
    -o "$dest/_pages.abi3.so" -lpthread
cp /usr/include/xxhash.h "$dest/"
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 -d "$dest" platformdirs
ls -l "$dest"
