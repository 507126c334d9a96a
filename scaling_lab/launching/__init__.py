"""Launching a sweep: worker processes, cluster jobs, Slurm. Usable without the command line."""
