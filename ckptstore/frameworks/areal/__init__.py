"""AReaL: layout of a run, its recover_info, and the command that resumes it."""
