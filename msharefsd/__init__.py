"""msharefsd: the file system and page server of msharefs."""
