"""When edits run: the queue, the worker process as its parent holds it, the machine."""
