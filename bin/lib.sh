# shellcheck shell=bash
# Shared by bin/setup, bin/quickstart and bin/test; sourced, never run. Needs ROOT, the checkout's folder.

VENV=$ROOT/.venv
LOG=$VENV/setup.log
# Where Debian's dataset-fashion-mnist puts its IDX files; the fashion-mnist task looks there by itself.
FASHION_MNIST_DEFAULT=/usr/share/datasets/fashion-mnist

# Everything these scripts say goes to stderr: stdout belongs to the command they start.
say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# die WHAT [HINT...]
die() {
  say "error: $1"
  shift
  for hint in "$@"; do printf '  %s\n' "$hint" >&2; done
  exit 1
}

# logged COMMAND...: its output goes to the log. No stdin, so that nothing can ask a question; descriptor 9 is
# bin/setup's lock, which a child that outlives us must not hold.
logged() {
  printf '\n$ %s\n' "$*" >>"$LOG"
  "$@" >>"$LOG" 2>&1 </dev/null 9>&-
}

# must COMMAND...: the same, and the end of the whole script if it fails.
must() { logged "$@" || failed "$*"; }

# failed WHAT [HINT...]: ends the script with the end of the log.
failed() {
  say "this failed: $1"
  tail -n 20 "$LOG" | sed 's/^/  | /' >&2
  die "setup is not complete; the whole log: $LOG" "${@:2}"
}

can_apt() { [[ $EUID == 0 ]] && command -v apt-get >/dev/null; }

# apt_install PACKAGE...: false without root or apt. The package lists are fetched only if it does not work without.
apt_install() {
  can_apt || return 1
  local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300)
  logged "${apt[@]}" install -y --no-install-recommends "$@" && return
  logged "${apt[@]}" update && logged "${apt[@]}" install -y --no-install-recommends "$@"
}

# find_fashion_mnist: sets FASHION_MNIST to the folder with the four IDX files, getting them if need be; false without.
find_fashion_mnist() {
  local share=$VENV/share try
  for try in "$FASHION_MNIST_DEFAULT" "$share$FASHION_MNIST_DEFAULT"; do
    FASHION_MNIST=$try
    has_fashion_mnist && return
  done
  command -v apt-get >/dev/null || return 1
  say "Fashion-MNIST: getting Debian's package dataset-fashion-mnist (31 MB)"
  if apt_install dataset-fashion-mnist; then
    FASHION_MNIST=$(dpkg -L dataset-fashion-mnist | sed -n 's|/train-images-idx3-ubyte.*||p')
    has_fashion_mnist && return
  fi
  # Without root the package can still be fetched and unpacked under .venv.
  local scratch
  scratch=$(mktemp -d "$VENV/fashion-mnist.XXXXXX")
  FASHION_MNIST=$share$FASHION_MNIST_DEFAULT
  if (cd "$scratch" && logged apt-get download dataset-fashion-mnist); then
    mkdir -p "$share"
    logged dpkg-deb -x "$scratch"/*.deb "$share" || true
  fi
  rm -rf "$scratch"
  has_fashion_mnist
}

has_fashion_mnist() { compgen -G "$FASHION_MNIST/train-images-idx3-ubyte*" >/dev/null; }

# use_venv: what `source .venv/bin/activate` does for the commands below, and in a container (root) Open MPI's consent.
use_venv() {
  export PATH=$VENV/bin:$PATH
  if [[ $EUID == 0 ]]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
}
