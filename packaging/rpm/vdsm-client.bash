_vdsm_client() {
    local IFS=$'\n' last=${COMP_WORDS[COMP_CWORD]}
    COMPREPLY=($(vdsm-client --complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
    if [[ $last == = || ${COMP_WORDS[COMP_CWORD-1]} == = ]]; then
        COMPREPLY=("${COMPREPLY[@]#*=}")
    elif [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]]; then
        compopt -o nospace
    fi
    if [[ ${#COMPREPLY[@]} == 0 ]]; then
        compopt -o default
    fi
}
complete -F _vdsm_client vdsm-client
