# bash completion for msharefsd: what --help lists
complete -F _longopt msharefsd
