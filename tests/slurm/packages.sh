#!/usr/bin/env bash
# Debian's packages of SLURM (13 MB), for the tests on a real one, unless they are there. Needs root, or sudo without
# a password; else it says so and ends with status 1.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

installed() { for program in munged slurmctld slurmd sbatch; do command -v "$program" >/dev/null || return 1; done; }
privileged() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

installed && exit
command -v apt-get >/dev/null || { echo "no apt-get here to install SLURM with" >&2; exit 1; }
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# without the recommended packages, of which there are many
if ! { privileged apt-get update && privileged apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge; } \
    >"$log" 2>&1 </dev/null || ! installed; then
  tail -n 3 "$log" >&2
  echo "cannot install SLURM's packages" >&2
  exit 1
fi
