#!/bin/sh
# Makes the virtual environment of the host programs (var/venv), or another one, from a lock file; does
# nothing when it is current.
#
#   [VENV=var/NAME] venv.sh LOCK...
#
# Changes: that environment, which one at a time prepares (VENV.lock; without flock(1) nobody waits); as root on Debian
# or Ubuntu, installs python3-venv where it is missing.
# Exit: 0 done, 1 failed, 3 a precondition is unmet and nothing was changed, 4 another one did not get done.
set -eu

code=3
root=$(cd "$(dirname "$0")/.." && pwd)
venv=$root/${VENV:-var/venv}

stamp() { # LOCK: the file that remembers what was installed from it
  printf '%s/.%s' "$venv" "$(printf '%s' "$1" | tr / -)"
}
current() { # LOCK: whether it is installed as it stands
  cmp -s "$1" "$(stamp "$1")"
}

look() { # LOCK...: sets `due` to those that are to be installed
  due=
  if "$venv/bin/python" -I -c 'import pip' 2>/dev/null; then
    for lock in "$@"; do current "$lock" || due="$due $lock"; done
  else
    # It was interrupted as it was made; or the host's Python is another one now, and looks elsewhere for packages.
    due=$*
  fi
}
own() { # PATH: under sudo it belongs to the owner of the clone all the same
  [ "$(id -u)" != 0 ] ||
    chown -R "$(python3 -c 'import os, sys; s = os.stat(sys.argv[1]); print(f"{s.st_uid}:{s.st_gid}")' "$root")" "$1"
}

look "$@"
[ -z "$due" ] && exit 0

refuse() { # CODE WHAT WHY FIX
  printf 'error[%s]: %s\n  why: %s\n  fix: %s\n  changed: nothing. more: docs/errors.md\n' "$@" >&2
  exit "$code"
}

case $root in
  *:*)
    refuse E-PATH "the clone's path contains a colon: $root" 'Python and Compose part one path from the next with it' \
      'move the clone into a directory without one'
    ;;
esac
command -v python3 >/dev/null ||
  refuse E-PYTHON 'python3 is not installed' 'the host programs are Python' 'apt-get install python3'
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  refuse E-PYTHON "$(python3 --version) is too old; 3.10 or newer is needed" \
    'the host programs use its features' 'install a newer python3 and put it first on PATH'

if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
  # Debian keeps these in a package of their own.
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo 'python3-venv is missing: installing it with apt-get' >&2
    export DEBIAN_FRONTEND=noninteractive
    apt() { apt-get -qy -o DPkg::Lock::Timeout=300 "$@"; }
    { apt update || true; apt install --no-install-recommends python3-venv; } >&2 ||
      refuse E-PYTHON 'python3-venv could not be installed' "apt-get's own words are above" \
        'install python3-venv, then run the same command again'
  else
    refuse E-PYTHON 'python3 lacks the venv module' 'Debian and Ubuntu package it apart' \
      'sudo apt-get install python3-venv'
  fi
fi

mkdir -p "$root/var"
if command -v flock >/dev/null; then
  # pip inherits it: should this script be killed, the environment is taken until pip has ended.
  exec 9>>"$venv.lock"
  own "$venv.lock"
  if ! flock -n 9; then
    echo "--> waiting for another command that prepares ${VENV:-var/venv}" >&2
    flock -w 900 9 || {
      code=4
      refuse E-PIP "another command has prepared ${VENV:-var/venv} for more than 900 s" \
        "one at a time may; it holds $venv.lock" 'wait for it, or end it; then run the same command again'
    }
  fi
  # The other one may have done what was due.
  look "$@"
  [ -n "$due" ] || exit 0
fi
echo "--> preparing the Python environment ${VENV:-var/venv}" >&2
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  python3 -m venv --clear "$venv"
  due=$*
fi
for lock in $due; do
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r "$lock" >&2 ||
    refuse E-PIP "the packages of $lock could not be installed" "pip's own words are above" \
      'see that pip reaches its index (docs/operate.md, mirrors and certificates), then run the same command again'
  cp "$lock" "$(stamp "$lock")"
done
own "$root/var"
