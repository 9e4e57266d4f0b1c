#!/usr/bin/env bash
# A virtual environment with a vLLM that this version of jaxrl was tried with, beside the trainer's own.
#
#     scripts/setup_vllm.sh [--cpu|--cuda] DIR
#
# --cpu (the default where there is no nvidia-smi) installs scripts/vllm/requirements-cpu.txt; --cuda the plain `vllm`
# of scripts/vllm/requirements-cuda.txt. Checks it by importing it, and prints the path for `rollout.vllm.python` as its
# last line. An environment that was made from the same file is left as it is, one of another file is made anew, and a
# folder that holds anything else is refused. PYTHON names the interpreter to use.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
kind=cpu
command -v nvidia-smi > /dev/null && kind=cuda
folder=
for argument in "$@"; do
    case "$argument" in
        --cpu) kind=cpu ;;
        --cuda) kind=cuda ;;
        -*) echo "setup_vllm.sh: $argument is not an option: --cpu or --cuda, and the folder to make" >&2; exit 2 ;;
        *) folder="$argument" ;;
    esac
done
if [[ -z "$folder" ]]; then
    echo "usage: scripts/setup_vllm.sh [--cpu|--cuda] DIR" >&2
    exit 2
fi
pins="$here/vllm/requirements-$kind.txt"
stamp="$folder/jaxrl-vllm.stamp"
mark="$folder/jaxrl-vllm.environment"  # there from the first moment on, also when an installation was broken off
python="${PYTHON:-python3}"
wanted="$(sha256sum < "$pins" | cut -d' ' -f1) $("$python" --version)"
if [[ ! -x "$folder/bin/python" || "$(cat "$stamp" 2> /dev/null)" != "$wanted" ]]; then
    if [[ -e "$folder" && ! -e "$mark" && ! -e "$stamp" && ( ! -d "$folder" || -n "$(ls -A "$folder")" ) ]]; then
        echo "setup_vllm.sh: $folder holds something that this script did not make, and making an environment would erase" \
            "it: name a new folder" >&2
        exit 2
    fi
    rm -rf "$folder"
    mkdir -p "$folder"
    touch "$mark"
    "$python" -m venv "$folder"
    # The CPU file lists every package, so nothing is resolved: a resolver would bring builds for CUDA that break it.
    resolve=()
    [[ "$kind" == cpu ]] && resolve=(--no-deps)
    "$folder/bin/python" -m pip install -qq "${resolve[@]}" -r "$pins" >&2
    (cd "$folder" && VLLM_NO_USAGE_STATS=1 bin/python -c 'import vllm; print("vllm", vllm.__version__)' >&2)
    echo "$wanted" > "$stamp"
fi
echo "$(cd "$folder" && pwd)/bin/python"
