# bash completion for mshare
_mshare() {
    local candidate
    COMPREPLY=()
    while IFS= read -r candidate; do
        # Names of regions are whatever their owners like: they are words here, and nothing more.
        COMPREPLY+=("$(printf %q "$candidate")")
    done < <(COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD _MSHARE_COMPLETE=complete_bash \
        "$1" 2>/dev/null)
}
complete -o default -F _mshare mshare
