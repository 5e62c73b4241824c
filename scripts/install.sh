# Sourced after environment.sh by the commands that install something.

# install_packages PACKAGE...: installs Debian packages; without the right to do so, ends with the command to type.
install_packages() {
  local install=()
  (($#)) || return 0
  say "Debian packages: $*"
  if ((EUID == 0)); then
    install=(env DEBIAN_FRONTEND=noninteractive apt-get)
  elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    install=(sudo -n env DEBIAN_FRONTEND=noninteractive apt-get)
  else
    die "these packages are missing and this user may not install them; type

    sudo apt-get update && sudo apt-get install -y --no-install-recommends $*

and run the command again"
  fi
  "${install[@]}" update -q
  "${install[@]}" install -q -y --no-install-recommends "$@"
}

# has_package PACKAGE: whether dpkg knows it as installed.
has_package() { dpkg-query -W -f='${Status}' "$1" 2>/dev/null | grep -q 'ok installed'; }

# install_torch PYTHON CONSTRAINTS: installs the pinned torch, as a CPU build if pip's indexes and links have one,
# otherwise the build that pip selects. The default build for Linux has gigabytes of CUDA; everything works with it, too.
install_torch() {
  local requirement
  requirement="$(grep -v '^#' "$root/scripts/requirements-torch.txt")"
  if "$1" -m pip install --quiet --dry-run --ignore-installed --no-deps "$requirement+cpu" >/dev/null 2>&1; then
    requirement+="+cpu"
  else
    say "pip finds no CPU build of $requirement: the default build, with several gigabytes of CUDA on x86-64"
  fi
  "$1" -m pip install --constraint "$2" "$requirement"
}
