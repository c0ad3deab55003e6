"""An artifact: a folder of files with a manifest, the session that runs it, and its verification."""
