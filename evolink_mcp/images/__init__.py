"""Images on this machine: folders, checks, downloads, files and previews."""
