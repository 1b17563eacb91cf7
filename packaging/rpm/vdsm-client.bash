_vdsm_client() {
    local words=("${COMP_WORDS[@]:1:COMP_CWORD}")
    local IFS=$'\n'
    COMPREPLY=($(vdsm-client --complete "${words[@]}" 2>/dev/null))
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]]; then
        compopt -o nospace
    elif [[ ${#COMPREPLY[@]} == 0 ]]; then
        compopt -o default
    fi
}
complete -F _vdsm_client vdsm-client
