# Sourced by the other scripts here: `source runs/setup.sh requirements.txt`.
# Changes to the repository's root, creates and activates .venv if no virtual environment is active,
# and installs the given requirements. Idempotent.
trap 'exit 130' INT TERM  # a stage that saved and stopped exits with 0: do not start the next one
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ]; then
  if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "runs/setup.sh: error: python3 is $(python3 --version 2>&1), expected 3.11 or newer" >&2
    exit 2
  fi
  [ -x .venv/bin/pip ] || python3 -m venv .venv
  source .venv/bin/activate
fi
echo "== installing $1"
python -m pip install --quiet --disable-pip-version-check -r "$1"
