"""What is in a graph: attention, the caches that it reads, the layers around it."""
