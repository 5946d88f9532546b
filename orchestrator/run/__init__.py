"""One execution of the pipeline: run folder, lease, queue, runner, worker."""
