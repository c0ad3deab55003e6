"""What several formats of one runtime share."""
