#!/usr/bin/env bash
# Sourced: check_paths NAME... refuses variables whose value cannot be a setting of the trainer as it stands.
#
# Hydra reads = ' " ( [ { # , $ and letters with accents in a value otherwise, and says so only once the training starts.
check_paths() {
    local name LC_ALL=C
    for name in "$@"; do
        [[ ${!name} =~ ^[A-Za-z0-9_/.+@%:\ -]*$ && ${!name} != *' ' && ${!name} != ' '* ]] || {
            echo "Error: $name=${!name}: a path with other characters than A-Z a-z 0-9 / . _ - + @ % : and inner spaces cannot be a setting; choose another" >&2
            exit 2
        }
    done
}
