"""What a run consists of: stages, their configurations, their kinds and their graph."""
