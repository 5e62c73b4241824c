# Sourced by scripts/test: the package with torch for 64-bit ARM, cross-compiled and run by QEMU, in build/aarch64-torch.
# Debian's libraries and Python for ARM are unpacked into a folder; nothing of them is installed.

arm_build="$root/build/aarch64-torch"
arm_root="$arm_build/root" # of Debian's packages
arm_site="$arm_build/site" # of Python's packages
# The newest torch of which pip's usual index has a CPU build for ARM; later ones are CUDA builds of several gigabytes.
arm_torch=torch==2.10.0
arm_python=(env "PYTHONPATH=$arm_site" QEMU_CPU=max,sve=off qemu-aarch64 -L "$arm_root" "$arm_root/usr/bin/python3")

# unpack_arm_root: Python and the libraries of the driver, with what they need, from where apt is set up to look.
unpack_arm_root() {
  local state="$arm_build/apt" apt package
  if ! command -v apt-get dpkg >/dev/null; then
    printf 'expected apt-get and dpkg, which unpack Debian packages for ARM\n' >&2
    return 1
  fi
  mkdir -p "$state"/{lists,archives}/partial
  : >"$state/status" # nothing is installed yet
  apt=(apt-get -q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o "APT::Sandbox::User=$(id -un)"
    -o Debug::NoLocking=1 -o "Dir::State::lists=$state/lists" -o "Dir::State::status=$state/status"
    -o "Dir::Cache=$state" -o "Dir::Cache::archives=$state/archives")
  "${apt[@]}" update && "${apt[@]}" install --download-only -y --no-install-recommends \
    python3 libstdc++6 libgomp1 libcli11-dev libssl-dev nlohmann-json3-dev || return
  for package in "$state"/archives/*.deb; do
    dpkg -x "$package" "$arm_root" || return
  done
}

# install_arm_site: the pinned packages of scripts/requirements.txt and torch, for the Python of arm_root.
install_arm_site() {
  local version
  version="$("${arm_python[@]}" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" || return
  "$python" -m pip install --quiet --no-deps --no-compile --only-binary=:all: --upgrade --target "$arm_site" \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
    --python-version "$version" -r "$root/scripts/requirements.txt" "$arm_torch"
}

prepare_arm_torch() {
  local hash
  hash="$(digest "$root/scripts/arm_torch.sh" "$root/scripts/requirements.txt")"
  [[ -d "$arm_site" ]] && up_to_date arm-torch "$hash" && return
  rm -rf "$arm_root" "$arm_site"
  unpack_arm_root && install_arm_site && completed arm-torch "$hash"
}

build_arm_torch() {
  local package="$arm_site/miniquant"
  [[ -f "$arm_build/build.ninja" ]] ||
    cmake --preset aarch64-torch -DMINIQUANT_ARM_ROOT="$arm_root" -DTorch_DIR="$arm_site/torch/share/cmake/Torch" || return
  cmake --build "$arm_build" ${JOBS:+--parallel "$JOBS"} || return
  rm -rf "$package"
  cp -r "$root/src/miniquant" "$package" && rm -rf "$package/lib" &&
    cmake --install "$arm_build" --component python --prefix "$package/lib"
}

# test_arm_python PYTEST_ARGUMENT...: tests of operators and of what is built on them, in a folder from which no other
# miniquant is found. Left out: an emulated program can start no other of its kind, nor a compiler; and torch's own
# product in bfloat16 rounds by half a percent more there than a test of it has.
test_arm_python() {
  (cd "$root/tests/python" && OMP_NUM_THREADS=2 "${arm_python[@]}" -m pytest -p no:cacheprovider \
    test_ops_*.py test_errors.py test_accumulator.py test_correction.py test_ridge.py test_superblocks.py test_linear.py \
    --deselect tests/python/test_linear.py::test_other_instruction_sets --deselect tests/python/test_linear.py::test_inductor \
    --deselect "tests/python/test_linear.py::test_products[48 rows, one group-64]" "$@")
}
