# Sourced by the commands of this folder: paths, caches and messages.
# Everything that a run writes stays inside the clone, so the caches that tools keep in the home directory are moved.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
python="$venv/bin/python"
release="$root/build/release"

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1
export PYTHONNOUSERSITE=1
export MPLCONFIGDIR="$root/build/cache/matplotlib"
export TORCHINDUCTOR_CACHE_DIR="$root/build/cache/inductor"
export HF_HOME="$root/build/cache/huggingface" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# The tools of .venv come first; python3 is found again by scripts/setup through sys.base_prefix.
export PATH="$venv/bin:$PATH"

if [[ -t 1 ]]; then
  bold=$'\e[1m' red=$'\e[31m' plain=$'\e[0m'
else
  bold='' red='' plain=''
fi

say() { printf '%s==> %s%s\n' "$bold" "$*" "$plain"; }

die() {
  printf '%serror:%s %s\n' "$red" "$plain" "$*" >&2
  exit 1
}

# digest FILE...: one hash of the files' contents. Without arguments: of the standard input.
digest() { cat -- "$@" | sha256sum | cut -c1-64; }

# up_to_date NAME HASH: whether step NAME was last completed with HASH. completed NAME HASH: records it.
up_to_date() { [[ "$(cat "$venv/stamps/$1" 2>/dev/null)" == "$2" ]]; }
completed() {
  mkdir -p "$venv/stamps"
  printf '%s\n' "$2" >"$venv/stamps/$1"
}
