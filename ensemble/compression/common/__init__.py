"""What several compression methods share."""
