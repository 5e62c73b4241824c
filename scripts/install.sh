# Sourced after environment.sh by the commands that install something.

# install_packages PACKAGE...: Debian packages, where this user may; else it ends with the command to type.
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

# install_torch PYTHON CONSTRAINTS: torch comes as a build for CPUs where pip's indexes have one. The default build for
# Linux brings gigabytes of CUDA, and its CMake package refuses to work without the CUDA toolkit.
install_torch() {
  local requirement found
  requirement="$(grep -v '^#' "$root/scripts/requirements-torch.txt")"
  found="$("$1" -m pip install --quiet --dry-run --ignore-installed --no-deps --report - "$requirement" 2>/dev/null |
    "$1" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])' 2>/dev/null || true)"
  [[ "$found" == *+cpu ]] || die "pip would install torch '${found:-none}', and miniquant is built against the CPU build of $requirement;
name PyTorch's index of CPU wheels in PIP_EXTRA_INDEX_URL (see the installation page of PyTorch) and run the command again"
  "$1" -m pip install --constraint "$2" "torch==$found"
}
