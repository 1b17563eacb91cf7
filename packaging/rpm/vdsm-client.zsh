#compdef vdsm-client
_vdsm_client() {
    local -a found
    found=(${(f)"$(vdsm-client --complete "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( ${#found} == 0 )); then
        _files
    elif [[ ${found[1]} == *= ]]; then
        compadd -S '' -a found
    else
        compadd -a found
    fi
}
compdef _vdsm_client vdsm-client
