#!/bin/bash
# Runs every command of the README's bash blocks as typed there, in order, in the project's
# environment; `make` targets are run by .ci/run itself. Needs what `make demo` leaves behind.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH="$PWD/.venv/bin:$PATH"
rm -rf build/mine runs/mine runs/demo

# Three backquotes, in octal: shellcheck takes written ones for a command in the wrong quotes.
fence=$'\140\140\140'
mapfile -t commands < <(
    sed -n "/^${fence}bash\$/,/^${fence}\$/p" README.md | grep -Ev "^(${fence}|make |#|\$)"
)
if ((${#commands[@]} < 5)); then
    echo 'README.md: too few commands found; has its form changed?' >&2
    exit 1
fi
for command in "${commands[@]}"; do
    printf '\n$ %s\n' "$command"
    bash -euo pipefail -c "$command"
done
