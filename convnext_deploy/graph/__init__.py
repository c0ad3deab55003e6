"""Steps between forms of the graph that several formats share."""
