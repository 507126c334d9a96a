"""The optimization step: gradient, optimizer, CUDA graph, compiled step libraries, devices, memory."""
