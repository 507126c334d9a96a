"""One run over several processes: data parallel and fully sharded."""
