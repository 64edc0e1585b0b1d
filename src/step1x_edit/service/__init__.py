"""What the program offers: edits of pictures and files, batches, stored jobs, the GPU."""
