#!/usr/bin/env bash
# Write docker/serve-*.txt: what the images hold, with the hashes of every build of each package.
# Run it after a change of constraints.txt or of the extras. Needs pip-tools.
set -euo pipefail
cd "$(dirname "$0")/.."
lock() {
  local image=$1 extra=$2
  pip-compile --quiet --generate-hashes --no-header --no-annotate --strip-extras \
    --no-emit-index-url --no-emit-find-links --constraint constraints.txt \
    --extra serve --extra "$extra" --output-file "docker/$image.txt" pyproject.toml
}
lock serve-cpu cpu
lock serve-gpu gpu
