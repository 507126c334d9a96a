"""One run over several processes: their team, data parallelism, and sharded (FSDP) training."""
