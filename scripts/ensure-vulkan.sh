#!/bin/sh
# Installs Mesa's software driver unless a Vulkan loader and a driver are installed already.
# Usage: scripts/ensure-vulkan.sh
set -eu

# shellcheck source=scripts/packages.sh
. "$(dirname "$0")/packages.sh"

fail() {
    echo "ensure-vulkan: this machine has no Vulkan driver and $1: install your GPU's Vulkan driver, or" \
        "Mesa's software one (Debian, Ubuntu: libvulkan1 mesa-vulkan-drivers; Fedora: vulkan-loader" \
        "mesa-vulkan-drivers; Arch: vulkan-icd-loader vulkan-swrast; Alpine: vulkan-loader" \
        "mesa-vulkan-swrast), and run this again." >&2
    exit 1
}

# Whether the dynamic linker would find library $1. Not every system's ldconfig can print a list, so folders are searched too.
# The parentheses start a subshell, which keeps the change of IFS local.
has_library() (
    if PATH="$PATH:/sbin:/usr/sbin" ldconfig -p 2>/dev/null | grep -F "$1" >/dev/null; then
        exit 0
    fi
    for file in /lib/"$1" /lib64/"$1" /usr/lib/"$1" /usr/lib/*/"$1" /usr/lib64/"$1" /usr/local/lib/"$1"; do
        if [ -e "$file" ]; then exit 0; fi
    done
    IFS=:
    for folder in ${LD_LIBRARY_PATH:-}; do
        if [ -e "$folder/$1" ]; then exit 0; fi
    done
    exit 1
)

# Whether manifest $1 and its library exist. Containers often have a GPU's manifest without its driver.
has_driver_of() {
    [ -r "$1" ] || return 1
    library=$(sed -n 's/.*"library_path"[^"]*"\([^"]*\)".*/\1/p' "$1" | head -n 1)
    case $library in
    '') return 1 ;;
    /*) [ -e "$library" ] ;;
    */*) [ -e "$(dirname "$1")/$library" ] ;;
    *) has_library "$library" ;;
    esac
}

# Whether one of the colon-separated files and folders $1 is or contains a usable manifest. $2 is appended to each.
has_driver_in() (
    IFS=:
    for place in $1; do
        if [ -f "$place$2" ] && has_driver_of "$place$2"; then exit 0; fi
        for manifest in "$place$2"/*.json; do
            if has_driver_of "$manifest"; then exit 0; fi
        done
    done
    exit 1
)

has_driver() {
    chosen=${VK_DRIVER_FILES:-${VK_ICD_FILENAMES:-}}
    if [ -n "$chosen" ]; then
        # With these variables, the loader looks nowhere else.
        has_driver_in "$chosen" ""
        return
    fi
    data=${XDG_DATA_HOME:-${HOME:-}/.local/share}:${XDG_DATA_DIRS:-/usr/local/share:/usr/share}
    config=${XDG_CONFIG_HOME:-${HOME:-}/.config}:${XDG_CONFIG_DIRS:-/etc/xdg}
    fixed=/usr/share:/usr/local/share:/etc:/usr/local/etc:/run/opengl-driver/share
    has_driver_in "$data:$config:$fixed" /vulkan/icd.d
}

has_vulkan() { has_library libvulkan.so.1 && has_driver; }

case $(uname -s) in
Darwin | MINGW* | MSYS* | CYGWIN*) exit 0 ;; # Metal and DX12 come with the system.
esac
if has_vulkan; then exit 0; fi

chosen=${VK_DRIVER_FILES:-${VK_ICD_FILENAMES:-}}
if [ -n "$chosen" ] && ! has_driver; then
    echo "ensure-vulkan: VK_DRIVER_FILES or VK_ICD_FILENAMES allows '$chosen' only, and no usable driver is" \
        "there: correct it or unset it." >&2
    exit 1
fi

choose_packages 'libvulkan1 mesa-vulkan-drivers' 'vulkan-loader mesa-vulkan-drivers' \
    'vulkan-icd-loader vulkan-swrast' 'vulkan-loader mesa-vulkan-swrast' || fail "$packages_why"
echo "ensure-vulkan: no Vulkan driver found; installing Mesa's software driver by $manager: $packages" >&2

# In older releases of Arch, the package mesa contains the software driver.
install_packages || { [ "$manager" = pacman ] && as_root pacman -S --noconfirm --needed vulkan-icd-loader mesa; } ||
    fail "$manager could not install one"
has_vulkan || fail "$manager installed none that can be found"
echo "ensure-vulkan: installed" >&2
