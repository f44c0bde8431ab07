#!/usr/bin/env bash
# Sets up, checks the style, and runs the test suite in two processes: CPU only, no network except
# to install packages.
#   bash runs/test.sh                  # everything
#   bash runs/test.sh -m "not slow"    # the fast tests: after every edit
#   bash runs/test.sh -n 0 tests/test_run.py    # one file, in one process
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-test.txt
ruff check .
exec python -m pytest -n 2 "$@"
