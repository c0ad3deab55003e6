"""Work on the nodes of a Ray cluster. Ray is an extra, and is imported only where a cluster is asked for."""
