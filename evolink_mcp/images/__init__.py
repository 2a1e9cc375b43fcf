"""Pictures on this machine: which folders, what the bytes hold, how they are fetched, saved and shown small."""
