#compdef vdsm-client
_vdsm-client() {
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
if [[ ${funcstack[1]} == _vdsm-client ]]; then
    _vdsm-client "$@"
else
    compdef _vdsm-client vdsm-client
fi
