function __mshare_candidates
    _MSHARE_COMPLETE=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args \
        _TYPER_COMPLETE_ARGS=(commandline -cp) mshare 2>/dev/null
end
complete --command mshare --no-files --arguments '(__mshare_candidates)'
