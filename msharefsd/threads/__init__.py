"""Running apart what may take its time: threads of users, and pauses."""
