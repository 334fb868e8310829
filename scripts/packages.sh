# Installing packages of the system, for the scripts beside this, which read it with `.`.

# Runs a command as root, by sudo if needed.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

has() { command -v "$1" >/dev/null 2>&1; }

# Sets $manager and $packages: $1 for apt-get, $2 for dnf, $3 for pacman, $4 for apk. If that cannot be, $packages_why says why.
choose_packages() {
    if has apt-get; then
        manager=apt-get packages=$1
    elif has dnf; then
        manager=dnf packages=$2
    elif has pacman; then
        manager=pacman packages=$3
    elif has apk; then
        manager=apk packages=$4
    else
        packages_why="none of apt-get, dnf, pacman and apk is here to install one"
        return 1
    fi
    if [ "$(id -u)" -ne 0 ] && ! has sudo; then
        packages_why="$manager needs root or sudo to install one"
        return 1
    fi
}

# $packages is unquoted because it is a list.
# shellcheck disable=SC2086
install_packages() {
    case $manager in
    apt-get)
        # A broken third-party list is not an error, since the lists on disk may suffice.
        as_root apt-get update || echo "apt-get update failed; using the lists there are" >&2
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $packages
        ;;
    dnf) as_root dnf install -y $packages ;;
    pacman) as_root pacman -Sy --noconfirm --needed $packages ;;
    apk) as_root apk add $packages ;;
    esac
}
