"""Identity weights other projects published, read as key/value sources for the same attention: one family per file."""
