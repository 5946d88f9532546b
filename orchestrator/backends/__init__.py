"""Where attempts run: inline, Ray tasks, Ray Train workers, Slurm jobs."""
