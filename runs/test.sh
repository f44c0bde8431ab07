#!/usr/bin/env bash
# Sets up, checks the style, and runs the whole test suite: CPU only, no network but for packages.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-test.txt
ruff check .
exec python -m pytest "$@"
