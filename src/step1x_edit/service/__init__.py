"""What is offered: edits of pictures and files, batches, stored jobs, the GPU."""
