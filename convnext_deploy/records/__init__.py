"""Every record that is written to disk, a module for each kind of file.

Records are frozen and refuse unknown fields, so that a misspelled key in a hand-edited file is an error and not
a setting that does nothing. They contain plain facts, and nothing here imports a framework.
"""
