#!/usr/bin/env bash
# Sourced: check_paths NAME... rejects variables whose value Hydra would misread.
#
# Hydra gives = ' " ( [ { # , $ and accented letters a meaning, and complains only when training starts.
check_paths() {
    local name LC_ALL=C
    for name in "$@"; do
        [[ ${!name} =~ ^[A-Za-z0-9_/.+@%:\ -]*$ && ${!name} != *' ' && ${!name} != ' '* ]] || {
            echo "Error: $name=${!name}: a path with other characters than A-Z a-z 0-9 / . _ - + @ % : and inner spaces cannot be a setting; choose another" >&2
            exit 2
        }
    done
}
