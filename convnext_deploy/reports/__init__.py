"""Pages from recorded results, and from nothing else: what is not in the files is not on the page."""
