"""One file a verb: the only modules that know the order of steps."""
