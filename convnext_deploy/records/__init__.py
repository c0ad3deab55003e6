"""Every record that is written to disk, a module for each kind of file.

Records are frozen and contain plain facts; nothing here imports a framework. What people write refuses unknown fields.
"""
