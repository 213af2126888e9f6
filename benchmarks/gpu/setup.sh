#!/bin/sh
# Sets a GPU host up: unpacks vLLM's parts once, puts kvkeep's compiled copier in place, makes room
# in /dev/shm. Run it in the project's root; it may run again.
#
#     benchmarks/gpu/setup.sh && export PYTHONPATH=/tmp/site:$PWD/src
#
# PARTS   parts of one .tar.xz with vLLM and what it needs, in order (default /tmp/parts)
# SITE    folder for PYTHONPATH (default /tmp/site)
# PACKED  what pack.sh made (default .gpu/native)
set -eu
parts=${PARTS:-/tmp/parts}
site=${SITE:-/tmp/site}
packed=${PACKED:-.gpu/native}
if [ ! -e "$site/.complete" ]; then
    mkdir -p "$site"
    cat "$parts"/part.* | xz -dc -T0 | tar xf - -C "$site"
    for wheel in "$packed"/*.whl; do
        python3 -m zipfile -e "$wheel" "$site"
    done
    touch "$site/.complete"
fi

copier=src/kvkeep/transfer/_pages.abi3.so
cp "$packed/_pages.abi3.so" "$copier"
works() {
    PYTHONPATH="$site:src" python3 -c 'import kvkeep.transfer._pages'
}
if ! works; then
    include=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')
    gcc -shared -fPIC -O3 -std=c11 "-I$include" "-I$packed" \
        src/kvkeep/transfer/_pages.c src/kvkeep/transfer/_arrivals.c \
        -o "$copier" -lpthread && works || {
        rm -f "$copier"
        echo "setup: no compiled copier here; kvkeep copies with numpy" >&2
    }
fi

# A tmpfs takes memory only for what is written, so a generous limit costs nothing.
if [ "$(df --output=avail -B1G /dev/shm | tail -1)" -lt 48 ]; then
    mount -o remount,size=64g /dev/shm || echo "setup: /dev/shm stays small" >&2
fi
nvidia-smi -L || true
df -h /dev/shm /tmp
uname -r
nproc
