"""What a run consists of: stages, their configurations, their graph."""
